"""The collectives of PPO: sums over processes, and errors that end all of them together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from transformers.utils import logging

from trl_sync.backbone.fingerprint import base_tensors, fingerprint_of
from trl_sync.errors import ConfigError, RewardError

logger = logging.get_logger(__name__)

Result = TypeVar("Result")


def reduce_sum(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of `tensor` over the processes, a collective."""
    reduced: Tensor = accelerator.reduce(tensor.clone(), reduction="sum")
    return reduced


def together(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What `work` returns, if it succeeds on every process; otherwise every process raises.

    A collective. `work` itself does local work that can fail on one process alone, such as a
    reward function; without this the others would wait for it in the next collective.

    Raises:
        RewardError: `work` failed on another process. Its own error, on the process that has one.
    """
    result: Result | None = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:  # shared with the other processes, then raised
        error = caught
    failed = torch.tensor(float(error is not None), device=accelerator.device)
    total = int(reduce_sum(accelerator, failed).item())
    if error is not None:
        raise error
    if total:
        raise RewardError(
            f"Rolling out or scoring failed on {total} other process(es); their output says why. "
            "Stopping too."
        )
    return result  # type: ignore[return-value]


def share_frozen(accelerator: Accelerator, model: nn.Module, name: str) -> None:
    """Gives every process rank 0's `model`, if they differ. A collective.

    Engines send what they wrap to all processes; a frozen model outside keeps what each process
    loaded, and a head that was missing in a checkpoint is drawn anew by each.

    Raises:
        ConfigError: the models have different tensors, on every process.
    """
    if accelerator.num_processes == 1:
        return
    if _same_everywhere(model):
        return
    shapes = str([(key, tensor.shape, tensor.dtype) for key, tensor in _all_tensors(model)])
    if len(set(gather_object([shapes]))) == 1:
        logger.warning(
            f"The {name} differs between processes: all of them get that of rank 0. Was a part of "
            "it drawn at random, such as a score head that its checkpoint does not hold?"
        )
        for _, tensor in _all_tensors(model):
            broadcast(tensor.data, from_process=0)
        if _same_everywhere(model):
            return
    raise ConfigError(
        f"The {name} has other tensors on some processes than on rank 0: load the same model "
        "everywhere."
    )


def _same_everywhere(model: nn.Module) -> bool:
    return len(set(gather_object([fingerprint_of(_all_tensors(model))]))) == 1


def _all_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, adapters among them, buffers and quantization state, in one order everywhere."""
    tensors = dict(base_tensors(model)) | dict(model.named_parameters())
    return sorted(tensors.items())
