"""The engine under the drill: what accelerate's environment chooses, set to the job's sizes."""

from __future__ import annotations

import os
from typing import Any

import torch

# DeepSpeed leaves smaller parameters whole on every rank; all of the drill's are small.
_PERSISTENCE = "stage3_param_persistence_threshold"


def make_accelerator(
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    max_grad_norm: float,
    find_unused_parameters: bool,
) -> Any:
    """accelerate's `Accelerator`, under DeepSpeed with the sizes that its config leaves open.

    DeepSpeed accumulates, clips and steps by itself. Jobs that follow one another in a process
    share its config, so that each writes its own sizes into it.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    accelerator = Accelerator(
        cpu=_needs_cpu(),
        gradient_accumulation_steps=gradient_accumulation_steps,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)
        ],
    )
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        config = plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = micro_batch_size
        config["gradient_accumulation_steps"] = gradient_accumulation_steps
        config["train_batch_size"] = (
            micro_batch_size * gradient_accumulation_steps * accelerator.num_processes
        )
        config["gradient_clipping"] = max_grad_norm
        config["zero_optimization"].setdefault(_PERSISTENCE, 0)
    return accelerator


def storage_dtype(accelerator: Any) -> torch.dtype:
    """What 4-bit weights are packed into: FSDP2 shards a frozen one only if it is a float."""
    return torch.float32 if accelerator.is_fsdp2 else torch.uint8


def release(model: Any) -> None:
    """Takes DeepSpeed's hooks off a model that is no longer trained; other engines keep none."""
    destroy = getattr(model, "destroy", None)
    if destroy is not None:
        destroy()


def _needs_cpu() -> bool:
    """True unless each local rank finds a GPU of its own; DeepSpeed chooses its own device."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return False
    return torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
