"""Parts for the tests of the manifest: checkpoints of Trainer runs, and ways to damage them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import tiny
from trl_sync.audit.manifest import Problem, check_files, read_manifest, write_manifest

ADAPTER = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
STEP = {"step": 7, "world_size": 1, "verified": True}


class WriteManifest(TrainerCallback):
    """Writes a manifest at every save, as the audit does once all ranks are equal."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_manifest(
                folder,
                scopes(kwargs["model"], kwargs["optimizer"]),
                step=state.global_step,
                world_size=args.world_size,
                verified=True,
            )


def scopes(model: nn.Module, optimizer: Any = None) -> dict[str, list[tuple[str, Tensor]]]:
    """The live tensors of a model and its optimizer by scope."""
    named = list(model.named_parameters())
    found = {
        "trainable": [(n, p) for n, p in named if p.requires_grad],
        "frozen": [(n, p) for n, p in named if not p.requires_grad],
        "buffers": list(model.named_buffers()),
    }
    if optimizer is not None:
        found["optimizer"] = list(_optimizer_tensors(named, optimizer))
    return found


def _optimizer_tensors(
    named: list[tuple[str, nn.Parameter]], optimizer: Any
) -> Iterator[tuple[str, Tensor]]:
    inner = getattr(optimizer, "optimizer", optimizer)
    for name, parameter in named:
        for key, value in sorted(inner.state.get(parameter, {}).items()):
            yield f"{name}.{key}", value


def lora_model(seed: int = 0) -> nn.Module:
    """The tiny Llama with a LoRA adapter of which no factor is zero."""
    base = tiny.llama(0)
    torch.manual_seed(seed)
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base, settings)


def train(
    output_dir: Path,
    model: Any,
    seed: int = 0,
    callback: type[TrainerCallback] = WriteManifest,
    resume_from: str | None = None,
    **changes: Any,
) -> Trainer:
    """A Trainer after two steps with a checkpoint of about four shards at each."""
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="100KB")
    options = {
        "output_dir": str(output_dir),
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "seed": seed,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    rows = [[3 + (i * j + seed) % 20 for j in range(8)] for i in range(16)]
    trainer = Trainer(
        model,
        TrainingArguments(**(options | changes)),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        callbacks=[callback()],
    )
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def flip(file: Path, position: int, mask: int = 1) -> None:
    """Changes the byte at `position`: the bits of `mask`."""
    content = bytearray(file.read_bytes())
    content[position] ^= mask
    file.write_bytes(content)


def tensor_at(file: Path, position: int) -> str | None:
    """The tensor that owns a byte of a safetensors file, None in the header.

    Found by shapes alone, by the safetensors library: its `offset_keys` are in file order.
    """
    with safe_open(file, framework="pt") as tensors:
        names = tensors.offset_keys()
        sizes = [tensors.get_tensor(name).nbytes for name in names]
    start = file.stat().st_size - sum(sizes)
    if position < start:
        return None
    for name, size in zip(names, sizes, strict=True):
        start += size
        if position < start:
            return name
    raise AssertionError(f"byte {position} is behind the end of {file}")


def found(folder: Path) -> list[tuple[str, str, str | None]]:
    """Kind, place and name of all that `check_files` says of a folder and its manifest."""
    return kinds(check_files(folder, read_manifest(folder)))


def kinds(problems: list[Problem]) -> list[tuple[str, str, str | None]]:
    """Kind, place and name of each."""
    return [(p.kind, p.place, p.name) for p in problems]


def shards(folder: Path) -> list[str]:
    """The names of the files that a whole model was saved in."""
    return sorted(p.name for p in folder.glob("model-*.safetensors"))
