"""Recomputing activations in backward, on every supported version of transformers.

transformers 5.23 renamed `gradient_checkpointing_*` to `activation_checkpointing_*` and warns at
the old names; earlier versions have only those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_sync.errors import ConfigError

KINDS = ("activation", "gradient")
# Where transformers (5.4 to 5.23) puts the function that a layer checkpoints itself with.
_FUNCTION = "_gradient_checkpointing_func"


def enable_checkpointing(
    model: nn.Module, options: dict[str, Any] | None = None, **kwargs: Any
) -> None:
    """Has the model recompute its activations; `options` are those of torch's `checkpoint`.

    Raises:
        ConfigError: it has no such method.
    """
    kind = _kind(model, "enable")
    if options is not None:
        kwargs[f"{kind}_checkpointing_kwargs"] = options
    getattr(model, f"{kind}_checkpointing_enable")(**kwargs)
    _evaluate_inside(model)


def disable_checkpointing(model: nn.Module) -> None:
    """Has the model keep its activations.

    Raises:
        ConfigError: it has no such method.
    """
    getattr(model, f"{_kind(model, 'disable')}_checkpointing_disable")()


def is_checkpointing(model: nn.Module) -> bool:
    """Whether the model recomputes its activations."""
    for kind in KINDS:
        name = f"is_{kind}_checkpointing"
        if hasattr(type(model), name):
            return bool(getattr(model, name))
    return False


def checkpointed_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that recompute their activations if their own `training` is set.

    What they compute stays as it is: what they contain has flags of its own.
    """
    for module in model.modules():
        recomputes = getattr(module, "gradient_checkpointing", False)
        if recomputes and isinstance(module, GradientCheckpointingLayer):
            yield module


def _evaluate_inside(model: nn.Module) -> None:
    """Has layers compute in evaluation mode, whatever the flag by which they decide to recompute.

    Some layers (OPT's, Falcon's) drop out by that same flag, also while they recompute.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and hasattr(module, _FUNCTION):
            recompute = getattr(module, _FUNCTION)
            setattr(module, _FUNCTION, functools.partial(_checkpointed, module, recompute))


def _checkpointed(
    layer: nn.Module, recompute: Callable[..., Any], compute: Callable[..., Any], *args: Any
) -> Any:
    return recompute(functools.partial(_in_evaluation_mode, layer, compute), *args)


def _in_evaluation_mode(layer: nn.Module, compute: Callable[..., Any], *args: Any) -> Any:
    training, layer.training = layer.training, False
    try:
        return compute(*args)
    finally:
        layer.training = training


class OldCheckpointingNames:
    """The names from before transformers 5.23, for modules that implement the newer ones."""

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`, with its arguments and errors."""
        enable: Any = getattr(self, "activation_checkpointing_enable")  # noqa: B009 - of a mixin
        enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of `activation_checkpointing_disable`."""
        disable: Any = getattr(self, "activation_checkpointing_disable")  # noqa: B009
        disable()


def _kind(model: nn.Module, what: str) -> str:
    for kind in KINDS:
        if hasattr(model, f"{kind}_checkpointing_{what}"):
            return kind
    raise ConfigError(f"{type(model).__name__} cannot recompute its activations in backward.")
