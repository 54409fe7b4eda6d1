"""The collectives of PPO: sums over processes, and errors that end all of them together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from trl_sync.errors import RewardError

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
