"""Faults of the processes: one is killed or late, or each believes it is alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, get_args

from torch import nn
from torch.optim import Optimizer

from trl_sync.audit.faults.planting import Planted, counting, planted
from trl_sync.audit.faults.state import unwrap

Place = Literal["before_backward", "in_step", "before_audit"]
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def rank_killed(
    model: nn.Module,
    *,
    step: int,
    place: Place,
    rank: int | None = 1,
    optimizer: Optimizer | None = None,
) -> AbstractContextManager[Planted]:
    """One rank ends at `place` of update `step` with SIGKILL, as for want of memory.

    Places: after the first forward and before its backward; in the optimizer's step before it
    writes; after the update and before an audit that hooks the step's end or follows it.
    """

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return _at_place(model, die, step=step, place=place, rank=rank, optimizer=optimizer)


def rank_delayed(
    model: nn.Module,
    *,
    step: int,
    place: Place,
    delay_s: float,
    rank: int | None = 1,
    optimizer: Optimizer | None = None,
) -> AbstractContextManager[Planted]:
    """One rank sleeps `delay_s` at `place` of update `step`; places as in rank_killed."""

    def sleep() -> None:
        time.sleep(delay_s)

    return _at_place(model, sleep, step=step, place=place, rank=rank, optimizer=optimizer)


@contextmanager
def _at_place(
    model: nn.Module,
    act: Callable[[], None],
    *,
    step: int,
    place: Place,
    rank: int | None,
    optimizer: Optimizer | None,
) -> Iterator[Planted]:
    if place not in get_args(Place):
        raise ValueError(f"place is {place!r}, expected one of {', '.join(get_args(Place))}")
    with planted(step=step, rank=rank) as fault, counting(optimizer) as clock:

        def strike(*_: object) -> None:
            if fault.is_due(clock.update):
                fault.struck = True
                act()

        if place == "in_step":
            clock.on_before = strike
        elif place == "before_audit":
            clock.on_after = strike
        watches_forward = place == "before_backward"
        handle = unwrap(model).register_forward_hook(strike) if watches_forward else None
        try:
            yield fault
        finally:
            if handle is not None:
                handle.remove()


@contextmanager
def launched_alone(*, num_processes: int = 2) -> Iterator[Planted]:
    """An Accelerator made in the block believes to be alone though the launcher started several.

    That is what happens on a machine without an accelerator when the launch lacks `use_cpu`.
    accelerate's state is as before when the block ends.
    """
    from accelerate.state import AcceleratorState, PartialState

    # accelerate has no public way to start over. Checked on accelerate 1.15.
    shared = (AcceleratorState._shared_state, PartialState._shared_state)
    states = [dict(state) for state in shared]
    variables = {name: os.environ.pop(name) for name in LAUNCHER_VARIABLES if name in os.environ}
    try:
        for state in shared:
            state.clear()
        PartialState()
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(num_processes)})
        os.environ.update(variables)
        yield Planted(step=None, rank=None, struck=True)
    finally:
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(variables)
        for state, before in zip(shared, states, strict=True):
            state.clear()
            state.update(before)
