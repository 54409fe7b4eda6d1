"""What all faults share: which rank and update they strike, on which tensor, and that they did."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from trl_sync.audit.faults.state import (
    deepspeed_engine,
    local_tensor,
    named_parameters,
    unwrap,
    unwrap_optimizer,
)

Suitable = Callable[[nn.Parameter], bool]


class FaultNotPlantedError(RuntimeError):
    """The block ended before the fault struck: the drill would have proved nothing."""


@dataclass(slots=True, kw_only=True)
class Planted:
    """What a fault does on this rank; `struck` and `tensor` are filled in when it strikes.

    `step` is the 1-based update, None if the fault acts at once; `rank` None means all ranks.
    """

    step: int | None
    rank: int | None
    tensor: str | None = None
    struck: bool = False

    def is_here(self) -> bool:
        """True on a rank where the fault strikes."""
        return self.rank is None or self.rank == this_rank()

    def is_due(self, update: int) -> bool:
        """True if the fault strikes this rank in `update` and has not done so yet."""
        return self.is_now(update) and not self.struck

    def is_now(self, update: int) -> bool:
        """True on a rank where the fault strikes, all through the update that it strikes."""
        return update == self.step and self.is_here()


@contextmanager
def planted(*, step: int | None, rank: int | None) -> Iterator[Planted]:
    """A fault that must have struck by the end of the block, unless the block raises.

    Raises:
        FaultNotPlantedError: it has not.
        ValueError: there is no such step or rank.
    """
    if step is not None and step < 1:
        raise ValueError(f"step is {step}, expected the 1-based number of an update")
    if rank is not None and not 0 <= rank < num_ranks():
        raise ValueError(f"rank is {rank}, but {num_ranks()} process(es) run: launch more of them")
    fault = Planted(step=step, rank=rank)
    yield fault
    if fault.is_here() and not fault.struck:
        raise FaultNotPlantedError(
            f"the fault for update {step} did not strike rank {this_rank()}: the block ended "
            "before that update, or trained another model or optimizer. Train further, or name an "
            "earlier step."
        )


def this_rank() -> int:
    """This process's rank; 0 in a process that was launched alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def num_ranks() -> int:
    """How many processes the launcher started."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


class UpdateClock:
    """The number of the update in progress, and calls at fixed places in the optimizer's step.

    Around one `optimizer.step()`, in this order: `on_enter`, the step hooks that others registered,
    `on_before`, the update itself, `on_after`, the others' hooks, `on_exit`. So an audit that hooks
    the optimizer has looked before `on_before` and looks again after `on_after`.

    DeepSpeed takes one step of torch's optimizer for each parameter group: `on_enter` and `on_exit`
    are then around all of them, `on_before` and `on_after` around each.
    """

    def __init__(self, optimizer: Optimizer | None) -> None:
        self.update = 1
        # Inside `Trainer.train` the optimizer is made late: the first one that steps is taken.
        self.optimizer = None if optimizer is None else unwrap_optimizer(optimizer)
        self.is_paused = False
        self.on_enter: Callable[[], None] = _nothing
        self.on_before: Callable[[], None] = _nothing
        self.on_after: Callable[[], None] = _nothing
        self.on_exit: Callable[[], None] = _nothing
        self._hooks = ExitStack()
        self._is_hooked = False
        self._is_in_engine = False

    def start(self) -> None:
        """Counts from now on."""
        for handle in (
            register_optimizer_step_pre_hook(self._enter),
            register_optimizer_step_post_hook(self._exit),
        ):
            self._hooks.callback(handle.remove)
        # On the class: a Trainer makes its engine only inside train().
        if (engine := deepspeed_engine()) is not None:
            update = self._counted(engine._take_model_step)
            self._hooks.enter_context(patched(engine, "_take_model_step", update))

    def _counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """DeepSpeed's update, with the calls around it."""

        def update(engine: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._counts(unwrap_optimizer(engine)):
                return run(engine, *args, **kwargs)
            self.on_enter()
            self._is_in_engine = True
            try:
                result = run(engine, *args, **kwargs)
            finally:
                self._is_in_engine = False
            self.on_exit()
            self.update += 1
            return result

        return update

    def stop(self) -> None:
        """Removes every hook."""
        self._hooks.close()

    def _enter(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._counts(optimizer):
            return
        if not self._is_hooked:
            self._hook(optimizer)
        if not self._is_in_engine:
            self.on_enter()

    def _hook(self, optimizer: Optimizer) -> None:
        """Registers the inner hooks: as late as this, so that others' hooks have their place."""
        before = optimizer.register_step_pre_hook(lambda *_: self._call(self.on_before))
        after = optimizer.register_step_post_hook(lambda *_: self._call(self.on_after))
        # No public call puts a hook first. Checked on torch 2.13; tests/audit/test_faults.py sees
        # when it moves.
        post_hooks: Any = optimizer._optimizer_step_post_hooks
        post_hooks.move_to_end(after.id, last=False)
        self._hooks.callback(before.remove)
        self._hooks.callback(after.remove)
        self._is_hooked = True

    def _call(self, callback: Callable[[], None]) -> None:
        if not self.is_paused:
            callback()

    def _exit(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._counts(optimizer) and not self._is_in_engine:
            self.on_exit()
            self.update += 1

    def _counts(self, optimizer: Optimizer) -> bool:
        if self.optimizer is None:
            self.optimizer = optimizer
        return optimizer is self.optimizer and not self.is_paused


def _nothing() -> None:
    return None


@contextmanager
def counting(optimizer: Optimizer | None = None) -> Iterator[UpdateClock]:
    """A clock of `optimizer`, or of the first one that steps."""
    clock = UpdateClock(optimizer)
    clock.start()
    try:
        yield clock
    finally:
        clock.stop()


@contextmanager
def in_first_forward(
    model: nn.Module,
    strike: Callable[[Planted, UpdateClock], None],
    *,
    step: int,
    rank: int | None,
    optimizer: Optimizer | None = None,
) -> Iterator[Planted]:
    """`strike` runs right before the first forward of update `step`, without gradients."""
    with planted(step=step, rank=rank) as fault, counting(optimizer) as clock:

        def hook(*_: Any) -> None:
            if fault.is_due(clock.update):
                with torch.no_grad():
                    strike(fault, clock)
                fault.struck = True

        # Before the engine gathers what the forward needs: what is written takes part in it.
        handle = unwrap(model).register_forward_pre_hook(hook, prepend=True)
        try:
            yield fault
        finally:
            handle.remove()


@contextmanager
def at_once_or_in_forward(
    model: nn.Module,
    strike: Callable[[Planted, UpdateClock], None],
    *,
    step: int | None,
    rank: int | None,
    optimizer: Optimizer | None = None,
) -> Iterator[Planted]:
    """`strike` runs now, or with a `step` right before the first forward of that update."""
    if step is not None:
        with in_first_forward(model, strike, step=step, rank=rank, optimizer=optimizer) as fault:
            yield fault
        return
    with planted(step=None, rank=rank) as fault:
        if fault.is_here():
            with torch.no_grad():
                strike(fault, UpdateClock(optimizer))
            fault.struck = True
        yield fault


@contextmanager
def patched(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """`owner.name` is `replacement` inside the block."""
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def pick(model: nn.Module, tensor: str | None, suitable: Suitable) -> tuple[str, nn.Parameter]:
    """The parameter called `tensor` in the unwrapped model, or the first suitable one.

    Raises:
        ValueError: there is none of that name, or none that is suitable.
    """
    parameters = named_parameters(model)
    if tensor is not None and tensor not in parameters:
        some = ", ".join(list(parameters)[:5])
        raise ValueError(f"no parameter is called {tensor}; expected one of {some}, ...")
    for name, parameter in parameters.items():
        if (tensor is None and suitable(parameter)) or name == tensor:
            return name, parameter
    raise ValueError(
        f"none of the {len(parameters)} parameters of {type(unwrap(model)).__name__} suits this "
        "fault; name one with `tensor`, or plant it at another step."
    )


def is_trainable(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and local_tensor(parameter).numel() > 0


def is_frozen(parameter: nn.Parameter) -> bool:
    return not parameter.requires_grad and local_tensor(parameter).numel() > 0


def bytes_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor as bytes; writing to it leaves autograd's version alone.

    Raises:
        ValueError: the tensor is not contiguous.
    """
    local = local_tensor(tensor)
    if not local.is_contiguous():
        raise ValueError(f"a tensor of strides {local.stride()}; expected a contiguous one")
    return local.view(-1).view(torch.uint8)


def require_optimizer(clock: UpdateClock) -> Optimizer:
    """The clock's optimizer.

    Raises:
        ValueError: none has stepped yet, and none was given.
    """
    if clock.optimizer is None:
        raise ValueError("no optimizer has stepped yet: pass `optimizer`, or a step of at least 2")
    return clock.optimizer


def add_to_optimizer(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    """The first group trains `parameters`, too."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    optimizer.param_groups[0]["params"].extend(p for p in parameters if id(p) not in known)
