"""Faults of the gradient reduction: bypassed on all ranks, or wrong on one.

Gradients are changed after the reduction (and after accelerate's clipping, if the loop clips) and
before anything looks at them: a Trainer callback at `on_pre_optimizer_step`, a step hook of the
optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from trl_sync.audit.faults.engines import refuse_if_absent
from trl_sync.audit.faults.planting import (
    Planted,
    counting,
    is_trainable,
    patched,
    pick,
    planted,
)
from trl_sync.audit.faults.state import gradient_of, named_parameters, unwrap


def forward_unwrapped(
    model: nn.Module, *, step: int, optimizer: Optimizer | None = None
) -> AbstractContextManager[Planted]:
    """All ranks run the forwards of one update on the module inside DistributedDataParallel.

    The reducer is not armed, so every rank keeps its own gradients.
    """
    refuse_if_absent("forward_unwrapped")

    def call(wrapper: DistributedDataParallel, args: Any, kwargs: Any) -> Any:
        return wrapper.module(*args, **kwargs)

    return _other_forward(model, call, step=step, optimizer=optimizer)


def no_sync_on_last_micro_batch(
    model: nn.Module, *, step: int, optimizer: Optimizer | None = None
) -> AbstractContextManager[Planted]:
    """All ranks run the last micro-batch of one update under `no_sync`, too."""
    refuse_if_absent("no_sync_on_last_micro_batch")
    forward = DistributedDataParallel.forward

    def call(wrapper: DistributedDataParallel, args: Any, kwargs: Any) -> Any:
        with wrapper.no_sync():
            return forward(wrapper, *args, **kwargs)

    return _other_forward(model, call, step=step, optimizer=optimizer)


@contextmanager
def _other_forward(
    model: nn.Module,
    call: Callable[[DistributedDataParallel, Any, Any], Any],
    *,
    step: int,
    optimizer: Optimizer | None,
) -> Iterator[Planted]:
    """`call` runs in place of the wrapper's forward in update `step`."""
    forward = DistributedDataParallel.forward
    with planted(step=step, rank=None) as fault, counting(optimizer) as clock:

        def replacement(wrapper: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
            ours = clock.update == step and unwrap(wrapper) is unwrap(model)
            if not (ours and torch.is_grad_enabled()):
                return forward(wrapper, *args, **kwargs)
            fault.struck = True
            return call(wrapper, args, kwargs)

        # On the class: a Trainer wraps the model only inside train().
        with patched(DistributedDataParallel, "forward", replacement):
            yield fault


def gradients_clipped(
    model: nn.Module,
    *,
    step: int,
    rank: int | None = 1,
    factor: float = 0.7,
    optimizer: Optimizer | None = None,
) -> AbstractContextManager[Planted]:
    """One rank's gradients are all multiplied by `factor`, as clipping on this rank alone does."""

    def edit(fault: Planted) -> None:
        fault.tensor, _ = pick(model, None, _has_gradient)
        for gradient in _gradients(model):
            gradient *= factor

    return _edited_gradients(model, edit, step=step, rank=rank, optimizer=optimizer)


def reduction_returned_zeros(
    model: nn.Module,
    *,
    step: int,
    rank: int | None = 1,
    tensor: str | None = None,
    optimizer: Optimizer | None = None,
) -> AbstractContextManager[Planted]:
    """One rank's gradient of one tensor is zero after the reduction."""

    def edit(fault: Planted) -> None:
        fault.tensor, parameter = pick(model, fault.tensor or tensor, _has_gradient)
        gradient = gradient_of(parameter)
        if gradient is None:
            raise ValueError(f"{fault.tensor} has no gradient in update {step}")
        gradient.zero_()

    return _edited_gradients(model, edit, step=step, rank=rank, optimizer=optimizer)


def _has_gradient(parameter: nn.Parameter) -> bool:
    gradient = gradient_of(parameter)
    return is_trainable(parameter) and gradient is not None and bool(gradient.any())


def _gradients(model: nn.Module) -> list[Tensor]:
    found = (gradient_of(parameter) for parameter in named_parameters(model).values())
    return [gradient for gradient in found if gradient is not None]


@contextmanager
def _edited_gradients(
    model: nn.Module,
    edit: Callable[[Planted], None],
    *,
    step: int,
    rank: int | None,
    optimizer: Optimizer | None,
) -> Iterator[Planted]:
    """`edit` runs after the backward that reduces, and is done over when accelerate clips later.

    In a loop without accelerate's backward it runs when the optimizer's step begins; in one that
    clips by other means, there once more. DeepSpeed steps inside backward: there it runs when its
    optimizer's step begins, which clips by itself.
    """
    from accelerate import Accelerator

    run_backward, run_clip = Accelerator.backward, Accelerator.clip_grad_norm_
    reduced: list[tuple[Tensor, Tensor]] = []
    edited: list[Tensor] = []
    with planted(step=step, rank=rank) as fault, counting(optimizer) as clock:

        def strike() -> None:
            gradients = _gradients(model)
            reduced.extend((gradient, gradient.clone()) for gradient in gradients)
            edit(fault)
            edited[:] = [gradient.clone() for gradient in gradients]
            fault.struck = True

        def backward(accelerator: Any, *args: Any, **kwargs: Any) -> Any:
            update = clock.update
            result = run_backward(accelerator, *args, **kwargs)
            has_stepped = clock.update > update
            if accelerator.sync_gradients and fault.is_due(clock.update) and not has_stepped:
                strike()
            return result

        def clip(accelerator: Any, *args: Any, **kwargs: Any) -> Any:
            # Clipping the changed gradients would bring them back to the same norm.
            is_struck = bool(reduced)
            for gradient, before in reduced:
                gradient.copy_(before)
            reduced.clear()
            edited.clear()
            norm = run_clip(accelerator, *args, **kwargs)
            if is_struck:
                strike()
            return norm

        def enter() -> None:
            clipped = any(
                not torch.equal(gradient, after)
                for (gradient, _), after in zip(reduced, edited, strict=True)
            )
            if fault.is_due(clock.update):
                strike()
            elif clipped:
                edit(fault)
            reduced.clear()
            edited.clear()

        clock.on_enter = enter
        with (
            patched(Accelerator, "backward", backward),
            patched(Accelerator, "clip_grad_norm_", clip),
        ):
            yield fault
