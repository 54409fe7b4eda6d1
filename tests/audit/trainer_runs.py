"""Trainers of transformers and TRL with the audit, each small enough to run in a second or two."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl

import tiny
from audit_log import logged
from trl_sync import DesyncError
from trl_sync.audit.journal import JOURNAL_NAME
from trl_sync.audit.manifest import check_files, read_manifest

STEPS = 4
WORDS = [f"{a}{b} {c}" for a in "abcdef" for b in "ghij" for c in "klmn"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05}
# hidden_size is a multiple of the 64 values that one NF4 scale is for.
SIZE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}


def save_bases(folder: Path) -> None:
    """The models that trainers load, where TRL also looks for the reference.

    Called before the launch: in a job of several ranks only one of them writes.
    """
    tiny.llama(**SIZE).save_pretrained(folder / "base")
    tiny.reward_llama(**SIZE).save_pretrained(folder / "reward_base")


def base_model(base: str, folder: Path, *, is_reward: bool = False) -> Any:
    """A tiny model; `nf4` with 4-bit weights and double quantization."""
    kind = (
        transformers.AutoModelForSequenceClassification
        if is_reward
        else transformers.AutoModelForCausalLM
    )
    options: dict[str, Any] = {"dtype": torch.float32}
    if base == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    return kind.from_pretrained(folder / ("reward_base" if is_reward else "base"), **options)


def arguments(output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Training arguments of every kind of trainer."""
    return {
        "output_dir": str(output_dir),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | changes


def rows(kind: str) -> datasets.Dataset:
    """Data in the columns that a kind of trainer takes."""
    texts = {
        "sft": {"prompt": WORDS, "completion": WORDS[::-1]},
        "dpo": {"prompt": WORDS, "chosen": WORDS[::-1], "rejected": WORDS},
        "kto": {"prompt": WORDS, "completion": WORDS[::-1], "label": [True, False] * 48},
        "reward": {"chosen": WORDS, "rejected": WORDS[::-1]},
        "rloo": {"prompt": WORDS},
        "grpo": {"prompt": WORDS},
    }
    tokens = [[3 + (i * j) % 20 for j in range(8)] for i in range(96)]
    return datasets.Dataset.from_dict(texts.get(kind, {"input_ids": tokens, "labels": tokens}))


def count_vowels(completions: list[str], **_: Any) -> list[float]:
    """A reward for RLOO and GRPO."""
    return [float(sum(text.count(vowel) for vowel in "aeiou")) for text in completions]


def trainer(
    kind: str,
    base: str,
    folder: Path,
    callback: Any,
    *,
    name: str = "",
    trainer_class: Any = None,
    model: Any = None,
    ref_model: Any = None,
    **changes: Any,
) -> Any:
    """A trainer of a kind on a base: `full` parameters, `lora`, or LoRA on `nf4`."""
    output_dir = folder / (name or f"{kind}-{base}")
    adapter = None if base == "full" else peft.LoraConfig(**LORA)
    if model is None:
        model = base_model(base, folder, is_reward=kind == "reward")
    callbacks = [] if callback is None else [callback]
    given: dict[str, Any] = {"train_dataset": rows(kind), "callbacks": callbacks}
    if changes.get("eval_strategy", "no") != "no":
        given["eval_dataset"] = rows(kind).select(range(8))
    if kind == "trainer":
        if adapter is not None:
            model = peft.get_peft_model(model, adapter)
        settings = transformers.TrainingArguments(**arguments(output_dir, **changes))
        return (trainer_class or transformers.Trainer)(model, settings, **given)
    prefix = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward"}.get(kind, kind.upper())
    if kind in ("rloo", "grpo"):
        changes = {"num_generations": 2, "max_completion_length": 4, **changes}
        given["reward_funcs"] = count_vowels
    if ref_model is not None:
        given["ref_model"] = ref_model
    make = trainer_class or getattr(trl, f"{prefix}Trainer")
    return make(
        model,
        args=getattr(trl, f"{prefix}Config")(**arguments(output_dir, **changes)),
        processing_class=tiny.tokenizer(),
        peft_config=adapter,
        **given,
    )


def journal(output_dir: str | Path) -> list[dict[str, Any]]:
    """The events so far, on the rank that writes them; elsewhere perhaps without the last."""
    path = Path(output_dir) / JOURNAL_NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def trained(made: Any, callback: Any, **options: Any) -> dict[str, Any]:
    """What was printed and audited in `made.train()`."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), logged() as messages:
        made.train(**options)
    summary = callback.summary()
    parameters = list(made.model.parameters())
    return {
        "end_lines": [t for t in printed.getvalue().splitlines() if t.startswith("sync audit")],
        "audits": summary.audits,
        "desyncs": summary.desyncs,
        "messages": messages,
        "num_trainable": sum(p.requires_grad for p in parameters),
        "num_frozen": sum(not p.requires_grad for p in parameters),
        "losses": [entry["loss"] for entry in made.state.log_history if "loss" in entry],
        "journal": journal(made.args.output_dir),
    }


def attempt(made: Any, callback: Any, planting: Any = None, **options: Any) -> dict[str, Any]:
    """Trains with a fault: the error if there is one, and what is in the output folder."""
    found: dict[str, Any] = {"error": None, "planted": None}
    try:
        with planting or contextlib.nullcontext() as planted:
            found |= trained(made, callback, **options)
    except DesyncError as error:
        first = error.findings[0]
        found |= {
            "error": str(error),
            "cause": first.cause.value,
            "tensor": first.tensor,
            "num_tensors": first.num_tensors,
            "role": first.role,
            "ranks": first.ranks,
            "step": first.step,
        }
    finally:
        callback.close()
    if planted is not None:
        found["planted"] = planted.tensor
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # rank 0 has written what the others look for
    found["steps"] = made.state.global_step
    found["checkpoints"] = checkpoints(Path(made.args.output_dir))
    found["journal"] = journal(made.args.output_dir)
    return found


def checkpoints(output_dir: Path) -> dict[int, tuple[bool, list[str]]]:
    """By step: whether a checkpoint is marked verified, and what is wrong with its files."""
    found = {}
    for folder in output_dir.glob("checkpoint-*"):
        manifest = read_manifest(folder)
        problems = [str(problem) for problem in check_files(folder, manifest)]
        found[int(folder.name.rpartition("-")[2])] = (manifest.verified, problems)
    return dict(sorted(found.items()))


class UnwrappedLoss(trl.DPOTrainer):
    """Runs the loss on the module inside DistributedDataParallel."""

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(self.accelerator.unwrap_model(model), *args, **kwargs)


class LateAdapter(transformers.TrainerCallback):
    """Adds an adapter with a seed per rank once the model is wrapped."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(args.process_index)
        kwargs["model"].add_adapter("late", peft.LoraConfig(**LORA))
        kwargs["model"].base_model.set_adapter(["default", "late"])
        known = {id(p) for group in kwargs["optimizer"].param_groups for p in group["params"]}
        late = [p for p in kwargs["model"].parameters() if p.requires_grad and id(p) not in known]
        kwargs["optimizer"].add_param_group({"params": late})


class MergeAndUnmerge(transformers.TrainerCallback):
    """Hands the merged weights to an inference engine after the second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            kwargs["model"].merge_adapter()
            kwargs["model"].unmerge_adapter()


class DeclareSync(transformers.TrainerCallback):
    """Tells the audit that frozen weights are meant to move."""

    def __init__(self, audit: Any) -> None:
        self._audit = audit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._audit.auditor.declare_sync("adapters are merged for the inference engine")


def packed_bytes(model: Any) -> dict[str, list[int]]:
    """The 4-bit weights that have an adapter, as numbers."""
    named = model.named_parameters()
    return {n: p.flatten().tolist() for n, p in named if n.endswith("base_layer.weight")}


def damage_file(checkpoint: Path, damage: str) -> None:
    """Another value in the adapter's file, or in the optimizer's, that loads without an error."""
    if damage == "adapter":
        file = checkpoint / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-4] ^= 1  # the lowest bits of the last number
        file.write_bytes(content)
    elif damage == "optimizer":
        file = checkpoint / "optimizer.pt"
        state = torch.load(file, weights_only=True)
        state["state"][0]["exp_avg"].view(-1)[0] += 1e-3
        torch.save(state, file)
