"""Faults between two updates: something writes to the state of one rank, or merges the adapters.

They strike right before the first forward of update `step`.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trl_sync.audit.faults.engines import refuse_if_absent
from trl_sync.audit.faults.planting import (
    Planted,
    Suitable,
    UpdateClock,
    bytes_of,
    in_first_forward,
    is_frozen,
    is_trainable,
    pick,
    require_optimizer,
)
from trl_sync.audit.faults.state import (
    local_rows,
    moment_of,
    named_parameters,
    quantization_states,
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
    """One bit of one element of a trainable parameter is inverted; bit 0 is the lowest.

    Of a sharded parameter an element of this rank's shard.
    """

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
        rows, other = local_rows(parameter), _first_unlike_row(parameter)
        rows[[0, other]] = rows[[other, 0]]

    return in_first_forward(model, strike, step=step, rank=rank)


def _has_unlike_rows(parameter: nn.Parameter) -> bool:
    if not is_trainable(parameter):
        return False
    rows = local_rows(parameter)
    return bool((rows != rows[:1]).any())


def _first_unlike_row(parameter: nn.Parameter) -> int:
    rows = local_rows(parameter)
    unlike = (rows != rows[:1]).flatten(1).any(1)
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
        is_packed = _packed(model)
        has_packed = any(is_packed(p) for p in named_parameters(model).values())
        fault.tensor, parameter = pick(model, tensor, is_packed if has_packed else is_frozen)
        bytes_of(parameter)[byte] ^= 0xFF

    return in_first_forward(model, strike, step=step, rank=rank)


def _packed(model: nn.Module) -> Suitable:
    """What tells the packed 4-bit weights of the model from its other parameters."""
    parameters = named_parameters(model)
    packed = {id(parameters[name]) for name in quantization_states(model)}
    return lambda parameter: is_frozen(parameter) and id(parameter) in packed


def absmax_changed(
    model: nn.Module, *, step: int, rank: int | None = 1, tensor: str | None = None
) -> AbstractContextManager[Planted]:
    """The first block scale (absmax) of a bitsandbytes 4-bit weight changes.

    Under double quantization it is the 8-bit code of the scale.
    """

    def strike(fault: Planted, clock: UpdateClock) -> None:
        name, _ = pick(model, tensor, _packed(model))
        fault.tensor = f"{name}.absmax"
        bytes_of(quantization_states(model)[name].absmax)[0] ^= 0xFF

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
        stepped = require_optimizer(clock)

        def has_moment(parameter: nn.Parameter) -> bool:
            found = moment_of(stepped, parameter, moment)
            return found is not None and bool(found.any())

        fault.tensor, parameter = pick(model, tensor, has_moment)
        found = moment_of(stepped, parameter, moment)
        if found is None or not found.any():
            raise ValueError(f"{fault.tensor} has no non-zero {moment}; choose another tensor")
        values = found.view(-1)
        values[values.abs().argmax()] *= -1

    return in_first_forward(model, strike, step=step, rank=rank, optimizer=optimizer)


def adapter_merged(model: nn.Module, *, step: int) -> AbstractContextManager[Planted]:
    """All ranks merge the peft adapters into the base and take them out again.

    With a 4-bit or 16-bit base rounding leaves another base behind, the same on every rank.
    """
    refuse_if_absent("adapter_merged")

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
