"""What one rank of an engine does for test_engine_manifests.py: saves, and resumes from damage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import xxhash
from peft import LoraConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import engine_audits
import engines
import tiny
import trainer_runs
from audit_log import logged
from manifests import flip
from trl_sync import PPOTrainer, SyncAuditCallback
from trl_sync.audit.inventory import torch_optimizer
from trl_sync.audit.manifest_format import MANIFEST_NAME, own_checksum
from trl_sync.audit.manifest_shards import ShardedTensor
from trl_sync.backbone.loading import load_base
from trl_sync.backbone.quantization import nf4_config
from trl_sync.errors import CheckpointError, DesyncError

STRUCK = 1
TENSOR = "peft_model.base_model.model.model.layers.1.mlp.up_proj.lora_A.policy.weight"
HALFWAY, END = "checkpoint-4", "checkpoint-8"


def everything(engine: str, path: str) -> dict[str, Any]:
    """All of it, one training after the other."""
    folder = Path(path)
    found = saved(engine, folder)
    found["resumed"] = resumed(engine, folder, "whole")
    found["memory"] = resumed(engine, folder, "memory", plant=struck_parameter)
    found["file"] = resumed(engine, folder, "file", damage=flip_a_byte)
    found["missing"] = resumed(engine, folder, "missing", damage=remove_a_shard)
    found["base"] = resumed(engine, folder, "base", base="other")
    if engine.startswith("zero"):
        found["partition"] = resumed(engine, folder, "partition", plant=struck_partition)
    if engine == "zero2":
        found["ranks"] = resumed(engine, folder, "ranks", damage=of_four_ranks)
        found["ranks, file"] = resumed(engine, folder, "both", damage=of_four_ranks_and_damaged)
    if engine == "zero3":
        found["format 1"] = resumed(engine, folder, "format-1", damage=in_format_1)
    if engine == "fsdp2":
        found["rank 0 only"] = resumed(engine, folder, "partly", load=load_on_rank_0)
    return found


def trainer_for(engine: str, folder: Path, output: str, base: str, callbacks: list[Any]) -> Any:
    engines.start_anew(engine)
    # As a script does: the arguments come first, which changes how models are loaded.
    options = {"total_episodes": 32 * int(os.environ["WORLD_SIZE"]), **engines.settings(engine)}
    arguments = tiny.config(folder / output, save_strategy="steps", save_steps=4, **options)
    engines.start_anew(engine)
    return PPOTrainer(
        arguments,
        tiny.tokenizer(),
        nf4_base(folder / base),
        reward_model=count_e,
        train_dataset=tiny.prompts(),
        callbacks=callbacks,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def nf4_base(folder: Path) -> Any:
    return load_base(str(folder), quantization_config=nf4_config())


def count_e(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(text.count("e")) for text in completions]


class At(TrainerCallback):
    """Calls `action()` at one event."""

    def __init__(self, event: str, action: Callable[[], Any]) -> None:
        setattr(self, event, lambda *args, **kwargs: action())


def saved(engine: str, folder: Path) -> dict[str, Any]:
    """A run of two checkpoints; checksums of what it ended with, made without the manifest."""
    gathered: list[list[str]] = []
    count = At("on_step_end", lambda: gathered.append([]))
    with counted_gathers(gathered):
        trainer = trainer_for(engine, folder, "saved", "right", [count, SyncAuditCallback()])
        trainer.train()
    return {
        "gathered": [scopes for scopes in gathered if scopes],
        "trainable": sums(dict(whole_parameters(trainer))),
        "optimizer": sums(dict(moments(trainer))) if engine in ("fsdp2", "hsdp") else {},
    }


def counted_gathers(steps: list[list[str]]) -> Any:
    """Notes in the last list of `steps` the scope of each tensor that is gathered."""
    gather = ShardedTensor.gather

    def counting(member: ShardedTensor) -> Tensor:
        steps[-1].append(member.scope)
        return gather(member)

    return mock.patch.object(ShardedTensor, "gather", counting)


def whole_parameters(trainer: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter that trains, gathered as the engine does it. A collective."""
    for name, parameter in trainer.backbone.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach().clone()
        else:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            yield name, whole


def moments(trainer: Any) -> Iterator[tuple[str, Tensor]]:
    names = {id(p): name for name, p in trainer.backbone.named_parameters()}
    for parameter, state in torch_optimizer(trainer.optimizer).state.items():
        for key, value in state.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            yield f"{names[id(parameter)]}.{key}", whole


def sums(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {
        name: xxhash.xxh3_128_hexdigest(tensor.detach().contiguous().numpy().tobytes())
        for name, tensor in tensors.items()
    }


def resumed(
    engine: str,
    folder: Path,
    output: str,
    *,
    base: str = "right",
    damage: Callable[[str, Path], None] | None = None,
    plant: Callable[[Any], None] | None = None,
    load: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """What is said when a run goes on from a copy of the first checkpoint."""
    checkpoint = folder / output / HALFWAY
    if int(os.environ["RANK"]) == 0:
        shutil.copytree(folder / "saved" / HALFWAY, checkpoint)
        if damage is not None:
            damage(engine, checkpoint)
    torch.distributed.barrier()
    audit = SyncAuditCallback()
    gathered: list[list[str]] = [[]]
    count = At("on_step_end", lambda: gathered.append([]))
    planting = At("on_train_begin", lambda: plant and plant(trainer))
    trainer = trainer_for(engine, folder, output, base, [count, planting, audit])
    if load is not None:
        load(trainer)
    # PPOTrainer would refuse another base by its own checksum.
    other_base = mock.patch("trl_sync.ppo.checkpoint.check_same_run")
    try:
        with counted_gathers(gathered), other_base, logged() as messages:
            trainer.train(resume_from_checkpoint=str(checkpoint))
    except DesyncError as error:
        first = error.findings[0]
        return {
            "cause": first.cause.value,
            "tensor": first.tensor,
            "ranks": list(first.ranks),
            "said": str(error),
        }
    except CheckpointError as error:
        return {"said": str(error)}
    finally:
        audit.close()
    lines = trainer_runs.journal(trainer.args.output_dir)
    return {
        "steps": trainer.state.global_step,
        "gathered": gathered[0],
        "gathered_later": [scope for scopes in gathered[1:] for scope in scopes],
        "messages": messages,
        "events": [line["event"] for line in lines][:4],
    }


def struck_parameter(trainer: Any) -> None:
    """One bit of an adapter on one rank, after it was loaded."""
    if int(os.environ["RANK"]) == STRUCK:
        parameter = dict(trainer.backbone.named_parameters())[TENSOR]
        engine_audits.flip(engine_audits.own(parameter))


def struck_partition(trainer: Any) -> None:
    """One bit of the optimizer's state on one rank, after it was loaded."""
    if int(os.environ["RANK"]) == STRUCK:
        first = next(iter(torch_optimizer(trainer.optimizer).state.values()))
        engine_audits.flip(first["exp_avg"])


def load_on_rank_0(trainer: Any) -> None:
    """Has only rank 0 keep what it loads of the adapters; the others stay as they began."""
    load = trainer._load_from_checkpoint

    def load_partly(*args: Any, **kwargs: Any) -> None:
        named = trainer.backbone.named_parameters()
        held = [engine_audits.own(p) for _, p in named if p.requires_grad]
        before = [shard.clone() for shard in held]
        load(*args, **kwargs)
        if int(os.environ["RANK"]) != 0:
            for shard, old in zip(held, before, strict=True):
                shard.copy_(old)

    trainer._load_from_checkpoint = load_partly


def flip_a_byte(engine: str, checkpoint: Path) -> None:
    """In a file that the engine loads: an adapter, or a moment of rank 1's partition."""
    if not engine.startswith("zero"):
        flip(checkpoint / "adapter_model.safetensors", -1)
        return
    file = shard_of_optimizer(checkpoint)
    content = torch.load(file, map_location="cpu", weights_only=False)
    tensor = next(find(content, "exp_avg"))
    position = file.read_bytes().find(tensor.contiguous().numpy().tobytes())
    assert position > 0
    flip(file, position)


def of_four_ranks(engine: str, checkpoint: Path) -> None:
    """A manifest as if four ranks had saved; the files are those of two."""
    forge(checkpoint, lambda content: content.update(world_size=4))


def of_four_ranks_and_damaged(engine: str, checkpoint: Path) -> None:
    of_four_ranks(engine, checkpoint)
    flip_a_byte(engine, checkpoint)


def in_format_1(engine: str, checkpoint: Path) -> None:
    """The manifest in the format before there were shards: rank 0's partition for the optimizer."""

    def downgrade(content: dict[str, Any]) -> None:
        partitions = content.pop("partitions")
        del content["partitioned_by"]
        content["format"] = 1
        content["tensors"]["optimizer"] = partitions["0"]
        for named in content["tensors"].values():
            for record in named.values():
                record.pop("parts", None)

    forge(checkpoint, downgrade)


def forge(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest and mends its checksum."""
    file = checkpoint / MANIFEST_NAME
    content = json.loads(file.read_text())
    change(content)
    content["checksum"] = own_checksum(content)
    file.write_text(json.dumps(content))


def find(content: Any, name: str) -> Iterator[Tensor]:
    """Tensors under a key `name`, wherever it is."""
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in entries:
        if key == name and isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list):
            yield from find(value, name)


def remove_a_shard(engine: str, checkpoint: Path) -> None:
    shard_of_optimizer(checkpoint).unlink()


def shard_of_optimizer(checkpoint: Path) -> Path:
    """Rank 1's file: of DeepSpeed, or of torch's distributed checkpoints."""
    patterns = ("global_step*/*zero_pp_rank_1_*optim_states.pt", "optimizer_0/__1_*.distcp")
    (file,) = (file for pattern in patterns for file in checkpoint.glob(pattern))
    return file
