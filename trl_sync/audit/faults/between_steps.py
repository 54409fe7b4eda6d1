"""Faults between two updates: something writes to the state of one rank, or merges the adapters.

They strike right before the first forward of update `step`.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from trl_sync.audit.faults.planting import (
    Planted,
    UpdateClock,
    bytes_of,
    in_first_forward,
    is_frozen,
    is_trainable,
    pick,
    require_optimizer,
    unwrap,
)


def bit_flipped(
    model: nn.Module,
    *,
    step: int,
    rank: int | None = 1,
    tensor: str | None = None,
    element: int = 0,
    bit: int = 0,
) -> AbstractContextManager[Planted]:
    """One bit of one element of a trainable parameter is inverted; bit 0 is the lowest."""

    def strike(fault: Planted, clock: UpdateClock) -> None:
        fault.tensor, parameter = pick(model, tensor, is_trainable)
        position = element * parameter.element_size() + bit // 8
        bytes_of(parameter)[position] ^= 1 << bit % 8

    return in_first_forward(model, strike, step=step, rank=rank)


def rows_swapped(
    model: nn.Module, *, step: int, rank: int | None = 1, tensor: str | None = None
) -> AbstractContextManager[Planted]:
    """The first row of a trainable matrix changes places with the first row unlike it."""

    def strike(fault: Planted, clock: UpdateClock) -> None:
        fault.tensor, parameter = pick(model, tensor, _has_unlike_rows)
        other = _first_unlike_row(parameter)
        parameter.data[[0, other]] = parameter.data[[other, 0]]

    return in_first_forward(model, strike, step=step, rank=rank)


def _has_unlike_rows(parameter: nn.Parameter) -> bool:
    return is_trainable(parameter) and bool((parameter.data != parameter.data[:1]).any())


def _first_unlike_row(parameter: nn.Parameter) -> int:
    unlike = (parameter.data != parameter.data[:1]).flatten(1).any(1)
    return int(unlike.nonzero()[0])


def base_byte_changed(
    model: nn.Module,
    *,
    step: int,
    rank: int | None = 1,
    tensor: str | None = None,
    byte: int = 0,
) -> AbstractContextManager[Planted]:
    """All bits of one byte of a frozen parameter are inverted; packed 4-bit weights go first."""

    def strike(fault: Planted, clock: UpdateClock) -> None:
        has_packed = any(_is_packed(p) for p in unwrap(model).parameters())
        fault.tensor, parameter = pick(model, tensor, _is_packed if has_packed else is_frozen)
        bytes_of(parameter)[byte] ^= 0xFF

    return in_first_forward(model, strike, step=step, rank=rank)


def _is_packed(parameter: nn.Parameter) -> bool:
    return is_frozen(parameter) and getattr(parameter, "quant_state", None) is not None


def absmax_changed(
    model: nn.Module, *, step: int, rank: int | None = 1, tensor: str | None = None
) -> AbstractContextManager[Planted]:
    """The first block scale (absmax) of a bitsandbytes 4-bit weight changes.

    Under double quantization it is the 8-bit code of the scale.
    """

    def strike(fault: Planted, clock: UpdateClock) -> None:
        name, parameter = pick(model, tensor, _is_packed)
        fault.tensor = f"{name}.absmax"
        quant_state: Any = vars(parameter)["quant_state"]
        bytes_of(quant_state.absmax)[0] ^= 0xFF

    return in_first_forward(model, strike, step=step, rank=rank)


def optimizer_moment_changed(
    model: nn.Module,
    *,
    step: int,
    rank: int | None = 1,
    tensor: str | None = None,
    moment: str = "exp_avg",
    optimizer: Optimizer | None = None,
) -> AbstractContextManager[Planted]:
    """The largest element of one moment of a trainable parameter changes its sign.

    Its parameter departs in update `step`. Updates before it must have made the moment, so `step`
    is at least 2.
    """
    if step < 2:
        raise ValueError(f"step is {step}; the first update makes the moments: expected 2 or more")

    def strike(fault: Planted, clock: UpdateClock) -> None:
        state = require_optimizer(clock).state

        def has_moment(parameter: nn.Parameter) -> bool:
            found = state[parameter].get(moment) if parameter in state else None
            return isinstance(found, Tensor) and bool(found.any())

        fault.tensor, parameter = pick(model, tensor, has_moment)
        if not has_moment(parameter):
            raise ValueError(f"{fault.tensor} has no non-zero {moment}; choose another tensor")
        values = state[parameter][moment].data.view(-1)
        values[values.abs().argmax()] *= -1

    return in_first_forward(model, strike, step=step, rank=rank, optimizer=optimizer)


def adapter_merged(model: nn.Module, *, step: int) -> AbstractContextManager[Planted]:
    """All ranks merge the peft adapters into the base and take them out again.

    With a 4-bit or 16-bit base rounding leaves another base behind, the same on every rank.
    """

    def strike(fault: Planted, clock: UpdateClock) -> None:
        adapted = peft_model(model)
        if adapted is None:
            raise ValueError(f"{type(unwrap(model)).__name__} holds no peft model to merge")
        fault.tensor = _first_adapted_weight(adapted)
        with warnings.catch_warnings():
            # That rounding changes the base is the fault.
            warnings.filterwarnings("ignore", message=".*due to rounding errors")
            adapted.merge_adapter()
            adapted.unmerge_adapter()

    return in_first_forward(model, strike, step=step, rank=None)


def peft_model(model: nn.Module) -> Any:
    """The outermost peft model in `model`, or None."""
    for module in unwrap(model).modules():
        if hasattr(module, "merge_adapter") and hasattr(module, "unmerge_adapter"):
            return module
    return None


def _first_adapted_weight(model: nn.Module) -> str | None:
    names = (n for n, _ in model.named_parameters() if n.endswith("base_layer.weight"))
    return next(names, None)
