"""A frozen copy of a model, whose first layers the model may share."""

from __future__ import annotations

import copy
import re

from torch import nn

from trl_sync.errors import ConfigError

# The lists in which architectures keep their layers, as parameters name them.
_LAYERS = r"(^|\.)(h|layers|block|blocks)\.{layer}\."


def create_reference_model(
    model: nn.Module, num_shared_layers: int | None = None, pattern: str | None = None
) -> nn.Module:
    """A frozen copy in evaluation mode.

    With `num_shared_layers` everything before that layer is frozen in `model` too, and held in
    memory once. `pattern`, such as "transformer.h.{layer}", says what layers are called.

    Raises:
        ConfigError: the model is quantized, or has no layer of that name and number.
    """
    if any(getattr(module, "is_quantized", False) for module in model.modules()):
        raise ConfigError(
            "A quantized model is not copied: train an adapter on it, and the reference is the "
            "model without the adapter."
        )
    names = [name for name, _ in model.named_parameters()]
    shared: list[str] = []
    if num_shared_layers is not None:
        shared = names[: _first_of_layer(names, num_shared_layers, pattern)]
    reference = copy.deepcopy(model)
    for name in shared:
        parameter = model.get_parameter(name).requires_grad_(False)
        reference.get_parameter(name).data = parameter.data
    return reference.requires_grad_(False).eval()


def _first_of_layer(names: list[str], layer: int, pattern: str | None) -> int:
    """The position of that layer's first parameter."""
    if pattern is None:
        found = [bool(re.search(_LAYERS.format(layer=layer), name)) for name in names]
    else:
        found = [pattern.format(layer=layer) in name for name in names]
    if not any(found):
        raise ConfigError(
            f"num_shared_layers={layer}, but no parameter belongs to layer {layer}: the model has "
            "fewer layers, or calls them otherwise; then pass pattern."
        )
    return found.index(True)
