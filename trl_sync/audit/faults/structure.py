"""Faults of what is trained: after wrapping, in the optimizer, in the roles, or on one rank only.

Without a `step` they act when the block begins, else right before the first forward of that update.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trl_sync.audit.faults.between_steps import peft_model
from trl_sync.audit.faults.engines import refuse_if_absent
from trl_sync.audit.faults.planting import (
    Planted,
    UpdateClock,
    add_to_optimizer,
    at_once_or_in_forward,
    is_frozen,
    is_trainable,
    pick,
    require_optimizer,
    this_rank,
)
from trl_sync.audit.faults.state import named_parameters, restore, unwrap

LATE_ADAPTER = "late_adapter"


def unfrozen_after_wrapping(
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    step: int | None = None,
    tensor: str | None = None,
) -> AbstractContextManager[Planted]:
    """All ranks unfreeze a parameter that the wrapper took for frozen, and train it."""
    refuse_if_absent("unfrozen_after_wrapping")

    def strike(fault: Planted, clock: UpdateClock) -> None:
        fault.tensor, parameter = pick(model, tensor, _is_frozen_float)
        parameter.requires_grad_(True)
        add_to_optimizer(require_optimizer(clock), [parameter])

    return at_once_or_in_forward(model, strike, step=step, rank=None, optimizer=optimizer)


def _is_frozen_float(parameter: nn.Parameter) -> bool:
    return is_frozen(parameter) and parameter.is_floating_point()


def replaced_after_wrapping(
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    step: int | None = None,
    tensor: str | None = None,
) -> AbstractContextManager[Planted]:
    """All ranks put a new Parameter of the same values in the place of a wrapped one.

    DistributedDataParallel raises an error of its own unless `find_unused_parameters` is set.
    """
    refuse_if_absent("replaced_after_wrapping", late=step is not None)

    def strike(fault: Planted, clock: UpdateClock) -> None:
        fault.tensor, old = pick(model, tensor, is_trainable)
        new = nn.Parameter(old.detach().clone())
        owner, _, name = fault.tensor.rpartition(".")
        setattr(unwrap(model).get_submodule(owner), name, new)
        for group in require_optimizer(clock).param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]

    return at_once_or_in_forward(model, strike, step=step, rank=None, optimizer=optimizer)


@contextmanager
def adapter_added_after_wrapping(
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    step: int | None = None,
    seed: int = 0,
) -> Iterator[Planted]:
    """Every rank adds an adapter with a seed of its own, and trains it.

    A peft model gets a second adapter like its active one; another model a linear branch beside its
    first linear layer, which takes part until the end of the block.
    """
    refuse_if_absent("adapter_added_after_wrapping", late=step is not None)
    handles: list[Any] = []

    def strike(fault: Planted, clock: UpdateClock) -> None:
        known = {id(p) for p in named_parameters(model).values()}
        adapted = peft_model(model)
        with _seed_of_this_rank(seed):
            if adapted is None:
                handles.append(_add_branch(unwrap(model)))
            else:
                _add_peft_adapter(adapted)
        added = [(n, p) for n, p in named_parameters(model).items() if id(p) not in known]
        fault.tensor = added[0][0]
        add_to_optimizer(require_optimizer(clock), [p for _, p in added])

    try:
        with at_once_or_in_forward(
            model, strike, step=step, rank=None, optimizer=optimizer
        ) as fault:
            yield fault
    finally:
        for handle in handles:
            handle.remove()


def _add_peft_adapter(model: Any) -> None:
    active = model.active_adapters
    model.add_adapter(LATE_ADAPTER, copy.deepcopy(model.peft_config[active[0]]))
    model.base_model.set_adapter([*active, LATE_ADAPTER])


def _add_branch(model: nn.Module) -> Any:
    linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    if linear is None:
        raise ValueError(f"{type(model).__name__} has no linear layer for a branch")
    branch = nn.Linear(linear.in_features, linear.out_features, bias=False)
    branch.to(linear.weight.device)
    linear.add_module(LATE_ADAPTER, branch)
    return linear.register_forward_hook(lambda _, inputs, output: output + branch(inputs[0]))


@contextmanager
def _seed_of_this_rank(seed: int) -> Iterator[None]:
    """The global generators start at `seed` + rank, and are as before afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed + this_rank())
        yield


def head_seeded_per_rank(
    head: nn.Module, *, step: int | None = None, seed: int = 0
) -> AbstractContextManager[Planted]:
    """Every rank draws the parameters of a module that nothing broadcasts with a seed of its own.

    Meant for a reward head outside the wrapped model, or a model under FSDP2.
    """

    def strike(fault: Planted, clock: UpdateClock) -> None:
        fault.tensor, _ = pick(head, None, lambda parameter: parameter.is_floating_point())
        with _seed_of_this_rank(seed):
            for parameter in unwrap(head).parameters():
                parameter.data.normal_(std=0.02)

    return at_once_or_in_forward(head, strike, step=step, rank=None)


def checkpoint_restored_on_one_rank(
    model: nn.Module,
    *,
    optimizer: Optimizer,
    checkpoint: Mapping[str, Any],
    rank: int = 0,
) -> AbstractContextManager[Planted]:
    """One rank loads `checkpoint["model"]` and `checkpoint["optimizer"]`; the others start anew.

    Both are state dicts, or what `faults.state.capture` copied; tensors of the model that are not
    in it stay as they are.
    """

    def strike(fault: Planted, clock: UpdateClock) -> None:
        fault.tensor = next(n for n in named_parameters(model) if n in checkpoint["model"])
        restore(model, optimizer, checkpoint)

    return at_once_or_in_forward(model, strike, step=None, rank=rank)


def optimizer_holds_copies(
    model: nn.Module, *, optimizer: Optimizer | None = None, step: int | None = None
) -> AbstractContextManager[Planted]:
    """All ranks' optimizers hold copies of the parameters: the model never moves."""
    refuse_if_absent("optimizer_holds_copies")

    def strike(fault: Planted, clock: UpdateClock) -> None:
        fault.tensor, _ = pick(model, None, is_trainable)
        for group in require_optimizer(clock).param_groups:
            group["params"] = [p.detach().clone().requires_grad_() for p in group["params"]]

    return at_once_or_in_forward(model, strike, step=step, rank=None, optimizer=optimizer)


def parameter_not_in_optimizer(
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    step: int | None = None,
    tensor: str | None = None,
) -> AbstractContextManager[Planted]:
    """All ranks' optimizers lack one trainable parameter."""
    refuse_if_absent("parameter_not_in_optimizer")

    def strike(fault: Planted, clock: UpdateClock) -> None:
        fault.tensor, missing = pick(model, tensor, is_trainable)
        for group in require_optimizer(clock).param_groups:
            group["params"] = [p for p in group["params"] if p is not missing]

    return at_once_or_in_forward(model, strike, step=step, rank=None, optimizer=optimizer)


def tensor_added(
    model: nn.Module, *, step: int | None = None, rank: int | None = 1, name: str = "late_tensor"
) -> AbstractContextManager[Planted]:
    """One rank's model has one more trainable parameter, which takes no part in the forward."""
    refuse_if_absent("tensor_added", late=step is not None)

    def strike(fault: Planted, clock: UpdateClock) -> None:
        target = unwrap(model)
        device = next((p.device for p in target.parameters()), torch.device("cpu"))
        target.register_parameter(name, nn.Parameter(torch.ones(4, device=device)))
        fault.tensor = name

    return at_once_or_in_forward(model, strike, step=step, rank=rank)


@contextmanager
def dropout_in_reference(reference: nn.Module, *, step: int | None = None) -> Iterator[Planted]:
    """All ranks run the frozen reference in training mode, so that its dropout is active.

    Its modes are as before when the block ends.

    Raises:
        ValueError: it has no dropout layer with a positive probability.
    """
    modes = [(module, module.training) for module in reference.modules()]
    active = [n for n, m in reference.named_modules() if getattr(m, "p", 0) and _is_dropout(m)]
    if not active:
        raise ValueError(f"{type(reference).__name__} has no dropout layer with a probability > 0")

    def strike(fault: Planted, clock: UpdateClock) -> None:
        fault.tensor = active[0]
        reference.train()

    try:
        with at_once_or_in_forward(reference, strike, step=step, rank=None) as fault:
            yield fault
    finally:
        for module, mode in modes:
            module.training = mode


def _is_dropout(module: nn.Module) -> bool:
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
    return isinstance(module, kinds)
