"""Faults inside the optimizer's step: skipped, taken twice, or with another learning rate.

They act between an audit's two looks: after the step hooks that run before the update, and before
those that run after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from trl_sync.audit.faults.engines import refuse_if_absent
from trl_sync.audit.faults.planting import Planted, counting, planted, require_optimizer


@contextmanager
def step_skipped(
    *, step: int, rank: int | None = 1, optimizer: Optimizer | None = None
) -> Iterator[Planted]:
    """One rank's update is lost: `optimizer.step()` runs with its hooks and changes nothing.

    The gradients are hidden from the update, which leaves parameters without gradients alone.
    """
    hidden: list[tuple[nn.Parameter, Tensor]] = []
    with planted(step=step, rank=rank) as fault, counting(optimizer) as clock:

        def hide() -> None:
            if not fault.is_now(clock.update):
                return
            fault.struck = True
            for group in require_optimizer(clock).param_groups:
                hidden.extend((p, p.grad) for p in group["params"] if p.grad is not None)
            for parameter, _ in hidden:
                parameter.grad = None

        def show() -> None:
            for parameter, gradient in hidden:
                parameter.grad = gradient
            hidden.clear()

        clock.on_before, clock.on_after = hide, show
        yield fault


@contextmanager
def other_learning_rate(
    *, step: int, rank: int | None = 1, factor: float = 2.0, optimizer: Optimizer | None = None
) -> Iterator[Planted]:
    """One rank takes one update with its learning rates times `factor`."""
    rates: list[tuple[dict[str, Any], Any]] = []
    with planted(step=step, rank=rank) as fault, counting(optimizer) as clock:

        def change() -> None:
            if not fault.is_now(clock.update):
                return
            fault.struck = True
            for group in require_optimizer(clock).param_groups:
                rates.append((group, group["lr"]))
                group["lr"] = group["lr"] * factor

        def restore() -> None:
            for group, rate in rates:
                group["lr"] = rate
            rates.clear()

        clock.on_before, clock.on_after = change, restore
        yield fault


@contextmanager
def extra_optimizer_step(
    *,
    step: int,
    rank: int | None = 1,
    with_hooks: bool = True,
    optimizer: Optimizer | None = None,
) -> Iterator[Planted]:
    """One rank takes one update more with the same gradients, right after update `step`.

    `with_hooks` calls `optimizer.step()` again, so that hooks on it see one step more; they run on
    this rank alone, and a collective in them waits for a step that the others take later. Without,
    only the update is repeated, inside the same step and unseen by hooks.
    """
    if with_hooks:
        refuse_if_absent("extra_optimizer_step")
    with planted(step=step, rank=rank) as fault, counting(optimizer) as clock:

        def again() -> None:
            if not fault.is_now(clock.update):
                return
            fault.struck = True
            target = require_optimizer(clock)
            clock.is_paused = True
            try:
                if with_hooks:
                    target.step()
                else:
                    # torch wraps the class's step once to run the hooks; this is what it wrapped.
                    type(target).step.__wrapped__(target)  # type: ignore[attr-defined]
            finally:
                clock.is_paused = False

        if with_hooks:
            clock.on_exit = again
        else:
            clock.on_after = again
        yield fault
