"""Where a backward pass begins, and where an update begins and ends, under every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from trl_sync.audit.inventory import Inventory, torch_optimizer
from trl_sync.audit.sharding import fsdp_modules


class LoopHooks:
    """Hooks on a model and its optimizer that say what the loop has done.

    `updates` counts real optimizer steps since it was last set to 0; trainers count skipped ones
    too. `had_backward` is True from the first gradient on, until it is set to False.
    `sees_backward`: it can be told. `inside_backward`: the engine updates inside `backward`, and
    `before_step` and `after_step` are called there.
    """

    def __init__(self) -> None:
        self.updates = 0
        self.had_backward = self.sees_backward = self.inside_backward = False

    def listen(
        self, inventory: Inventory, optimizer: Any, on_backward: Callable[[], None], *, engine: str
    ) -> Iterator[Callable[[], None]]:
        """Hooks the loop of `engine`, accelerate's name; yields what undoes each hook."""
        register = getattr(torch_optimizer(optimizer), "register_step_post_hook", None)
        if register is not None:
            yield register(self._count_update).remove
        shards = fsdp_modules(inventory.model)
        managed = inventory.managed_by_fsdp2()
        trainable = [p for p in inventory.trainable.tensors if id(p) not in managed]
        if shards:
            # What they shard takes no part in the backward pass, their outputs do.
            yield on_backward_through(shards[0], on_backward)
            for module in shards:
                yield on_backward_through(module, self._note_module)
        elif engine == "FSDP":
            return
        elif trainable:
            # Gradients of the last parameters come first: where they are, backward has begun.
            def last(parameter: Tensor) -> None:
                on_backward()

            yield trainable[-1].register_post_accumulate_grad_hook(last).remove
            self.sees_backward = True
        for parameter in trainable:
            # Any of them may be unused, on this rank or on all.
            yield parameter.register_post_accumulate_grad_hook(self._note).remove

    def listen_inside_backward(
        self, optimizer: Any, before_step: Callable[[], None], after_step: Callable[[], None]
    ) -> Iterator[Callable[[], None]]:
        """Hooks the step that DeepSpeed takes inside `backward`; yields what undoes it."""

        def after() -> None:
            self.updates += 1
            after_step()

        optimizer = engine_optimizer(optimizer)
        if hasattr(optimizer, "step"):
            self.inside_backward = True
            yield around_engine_step(optimizer, before_step, after)

    def _count_update(self, *args: Any) -> None:
        self.updates += 1

    def _note(self, parameter: Tensor) -> None:
        self.had_backward = True

    def _note_module(self) -> None:
        # A loop may run these modules in ways that show nothing here: it counts once it is seen.
        self.sees_backward = self.had_backward = True


def engine_optimizer(optimizer: Any) -> Any:
    """DeepSpeed's own optimizer inside accelerate's wrapper; the innermost one if there is none.

    Its `step` is the whole update: it calls the inner optimizer once for each group of parameters
    and gathers what the ranks updated (deepspeed 0.19.8).
    """
    while True:
        if any(cls.__module__.startswith("deepspeed.runtime") for cls in type(optimizer).__mro__):
            return optimizer
        if not hasattr(optimizer, "optimizer"):
            return optimizer
        optimizer = optimizer.optimizer


def around_engine_step(
    optimizer: Any, before: Callable[[], None], after: Callable[[], None]
) -> Callable[[], None]:
    """Calls `before` and `after` around each update of DeepSpeed's `optimizer`; returns the undo.

    accelerate runs the engine's step inside `backward`, out of the loop's sight. `after` follows
    only updates that happened: an overflow of fp16 gradients skips one.
    """
    step, was_set = optimizer.step, "step" in vars(optimizer)
    active = [True]

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        if not active:
            return step(*args, **kwargs)
        before()
        result = step(*args, **kwargs)
        if not getattr(optimizer, "overflow", False):
            after()
        return result

    def undo() -> None:
        active.clear()
        # Somebody may have wrapped it again since; then ours stays below, and only passes on.
        if vars(optimizer).get("step") is watched_step:
            if was_set:
                optimizer.step = step
            else:
                del optimizer.step

    optimizer.step = watched_step
    return undo


def on_backward_through(module: nn.Module, function: Callable[[], None]) -> Callable[[], None]:
    """Calls `function` once a forward of `module`, when its backward begins; returns the undo.

    For modules whose parameters take no part in the backward pass themselves, such as those that
    FSDP2 shards. The outputs get a hook that leaves the gradient as it is.
    """

    def after_forward(module: nn.Module, args: Any, output: Any) -> None:
        waits = [True]

        def on_gradient(gradient: Tensor) -> None:
            if waits:
                waits.clear()
                function()

        for tensor in _tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(on_gradient)

    undo: Callable[[], None] = module.register_forward_hook(after_forward).remove
    return undo


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a module's output, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from _tensors_in(getattr(value, part.name))
