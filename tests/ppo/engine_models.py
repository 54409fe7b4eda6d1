"""Four separate models, and other numbers of ranks, under an engine; for test_engines_models.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

import engine_runs
import engines
import runs
import tiny
from trl_sync import CheckpointError, ConfigError, PPOTrainer
from trl_sync.backbone.fingerprint import fingerprint_of
from trl_sync.backbone.loading import load_base
from trl_sync.backbone.quantization import store_packed_as
from trl_sync.ppo import experience

SIZES = engine_runs.SIZES | {"num_mini_batches": 1}


def make(engine: str, folder: Path, ranks: int, prompts_seen: list[str], **changes: Any) -> Any:
    """A trainer of four full models on scripted responses."""

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        prompts_seen.extend(prompts)
        return runs.count_e(prompts, completions)

    local = engine_runs.GLOBAL_BATCH // ranks
    options = SIZES | engine_runs.SGD | engines.settings(engine) | changes
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": local // 2}
    models = {"value_model": tiny.reward_llama(seed=3)} if changes.pop("separate", True) else {}
    options.pop("separate", None)
    return PPOTrainer(
        tiny.config(folder / "out", **options),
        tiny.tokenizer(),
        tiny.llama(),
        reward_model=reward,
        train_dataset=tiny.prompts(),
        eval_dataset=tiny.prompts(4),
        peft_config=None if models else runs.lora(),
        **models,
    )


def train(trainer: Any, **options: Any) -> dict[str, Tensor]:
    with mock.patch.object(experience, "roll_out", engine_runs.scripted):
        trainer.train(**options)
    return engine_runs.whole_parameters(trainer)


def separate_models(engine: str, path: str) -> dict[str, Any]:
    """Four full models: a run, its resumption, and the model that was best put back at the end."""
    folder, (rank, ranks) = Path(path), engine_runs.rank_and_ranks()
    engines.start_anew(engine)
    trainer = make(engine, folder, ranks, [], save_strategy="steps", save_steps=2)
    values = train(trainer)
    trainer.save_model(str(folder / "final"))
    if rank == 0:
        torch.save(values, folder / "values.pt")
    engines.start_anew(engine)
    resumed = make(engine, folder, ranks, [])
    again = train(resumed, resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
    return {
        "engine": trainer.engine.value,
        "equal": engine_runs.checksums(values) == engine_runs.checksums(again),
        "sharded": sorted({type(p).__name__ for p in trainer.backbone.parameters()}),
        "best_restored": best_model(engine, folder, ranks),
    }


def best_model(engine: str, folder: Path, ranks: int) -> bool:
    """Whether training ends with the parameters of the checkpoint that scored best."""
    engines.start_anew(engine)
    trainer = make(
        engine,
        folder / "best",
        ranks,
        [],
        separate=False,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_wanted",
        greater_is_better=True,
    )
    kept: dict[int, dict[str, str]] = {}

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
        step = trainer.state.global_step
        kept[step] = engine_runs.checksums(engine_runs.whole_parameters(trainer))
        return {"eval_wanted": -float(step)}  # the first one is the best

    trainer.evaluate = evaluate
    ended = engine_runs.checksums(train(trainer))
    return ended == kept[2] and ended != kept[4]


def begin(engine: str, path: str) -> list[str]:
    """The first iteration of a run on these ranks; the prompts it saw, of all ranks."""
    folder, (_, ranks) = Path(path), engine_runs.rank_and_ranks()
    seen: list[str] = []
    engines.start_anew(engine)
    trainer = make(engine, folder, ranks, seen, separate=False, save_strategy="steps", save_steps=2)
    trainer.add_callback(runs.At("on_step_end", stop_after_two))
    train(trainer)
    return seen


def stop_after_two(state: Any, control: Any) -> None:
    control.should_training_stop |= state.global_step == 2


def go_on(engine: str, path: str) -> dict[str, Any]:
    """The rest of the run on these ranks."""
    folder, (_, ranks) = Path(path), engine_runs.rank_and_ranks()
    seen: list[str] = []
    engines.start_anew(engine)
    trainer = make(engine, folder, ranks, seen, separate=False)
    try:
        values = train(trainer, resume_from_checkpoint=True)
    except CheckpointError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"seen": seen, "steps": trainer.state.global_step, "values": flat(values)}


def flat(values: dict[str, Tensor]) -> list[float]:
    """A few numbers of each tensor, enough to tell runs apart."""
    return [float(x) for _, t in sorted(values.items()) for x in t.reshape(-1)[:3]]


def partitioned_while_loading(path: str) -> dict[str, Any]:
    """ZeRO-3: models loaded by transformers' own `from_pretrained` after the arguments exist."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    folder = Path(path)
    engines.start_anew("zero3")
    arguments = tiny.config(folder / "out", **SIZES, **engines.settings("zero3"))
    policy = AutoModelForCausalLM.from_pretrained(folder / "base")
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1)
    partitioned = [hasattr(p, "ds_id") for m in (policy, reward) for p in m.parameters()]
    trainer = PPOTrainer(
        arguments,
        tiny.tokenizer(),
        policy,
        reward_model=reward,
        train_dataset=tiny.prompts(),
        peft_config=runs.lora(),
    )
    widths = {"value_head": trainer.backbone.value_head.weight.shape[-1]}
    checksum = engine_runs.checksums(
        {n: p.detach() for n, p in trainer.backbone.causal_model.named_parameters()}
    )
    trainer.train()
    return {
        "partitioned": all(partitioned),
        "widths": widths,
        "embedding": checksum["model.embed_tokens.weight"],
        "steps": trainer.state.global_step,
    }


def in_bf16(engine: str, path: str) -> dict[str, Any]:
    """An NF4 base and a reward adapter in bf16: types, first ratios and bytes of the base."""
    folder = Path(path)
    found: dict[str, Any] = {}
    for storage in (torch.uint8, torch.float32):
        engines.start_anew(engine)
        backbone = runs.SharedBackbone(engine_runs.base(folder, "nf4"), runs.lora())
        runs.randomise(backbone)
        store_packed_as(backbone, storage)  # as bnb_4bit_quant_storage does
        backbone.add_reward_adapter(str(folder / "reward_adapter"))
        options = {"total_episodes": 32, **engines.settings(engine)}
        arguments = tiny.config(folder / "out", **options)
        # DeepSpeed's settings are compared with it; given as an argument a CPU refuses it.
        arguments.bf16 = engine.startswith("zero")
        with mock.patch.object(tiny, "config", return_value=arguments):
            trainer = runs.make(
                folder,
                model=backbone,
                reward=str(folder / "reward_adapter"),
                kind=runs.WatchedTrainer,
            )
        before = fingerprint_of(trainer.backbone.frozen_tensors())
        trainer.train()
        first = [batch for batch in trainer.micro_batches if batch["step"] == 0]
        off = torch.cat([(batch["ratio"] - 1).abs() for batch in first])
        exact = [float(x) for batch in first for x in batch["old_logprobs"].reshape(-1)]
        found[str(storage)] = {
            "largest_off": float(off.max()),
            "rounded": all(x == float(torch.tensor(x).bfloat16()) for x in exact),
            "values": str(first[0]["values"].dtype),
            "precision": trainer.accelerator.mixed_precision,
            "base": before,
            "loss": runs.rows(trainer)[-1]["loss"],
        }
    return found


def in_8_bit(path: str) -> str:
    folder = Path(path)
    engines.start_anew("fsdp2")
    config = BitsAndBytesConfig(load_in_8bit=True)
    base = load_base(str(folder / "base"), quantization_config=config)
    try:
        runs.make(folder, model=base, **engines.settings("fsdp2"))
    except ConfigError as error:
        return str(error)
    return "no error"
