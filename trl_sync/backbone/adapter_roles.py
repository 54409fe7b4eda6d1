"""Adapters of one PEFT model as roles: which one trains, and which one is the reference."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from peft import (
    LoraConfig,
    PeftModel,
    PeftType,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from trl_sync.backbone.roles import REFERENCE
from trl_sync.errors import ConfigError

# Of these kinds a new adapter changes no output.
_NOTHING_AT_FIRST = (PeftType.ADALORA, PeftType.IA3)


def starts_as_nothing(config: Any) -> bool:
    """Whether a new adapter of this kind leaves the model's outputs, and its base, as they are."""
    if isinstance(config, LoraConfig) and config.peft_type == PeftType.LORA:
        return config.init_lora_weights in (True, "gaussian")
    return config.peft_type in _NOTHING_AT_FIRST


def copy_adapter(model: PeftModel) -> str:
    """Adds a frozen copy of the active adapter and returns its name; what trains stays the same.

    Raises:
        ConfigError: PEFT cannot hold two adapters of this kind.
    """
    source = model.active_adapter
    name = REFERENCE
    while name in model.peft_config:
        name += "_"
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    state = get_peft_model_state_dict(model, adapter_name=source, save_embedding_layers=False)
    config = copy.deepcopy(model.peft_config[source])
    # What rewrites the base at initialisation has done so already.
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True
    try:
        model.add_adapter(name, config)
    except ValueError as error:
        raise ConfigError(
            f"The adapter {source!r} cannot be copied for the reference ({error}): pass ref_model."
        ) from error
    set_peft_model_state_dict(model, state, adapter_name=name)
    model.set_adapter(source)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(key, False))
    return name


@contextlib.contextmanager
def reference_adapter(policy: PeftModel, adapter: str | None) -> Iterator[None]:
    """Within the block `policy` runs with `adapter`, or with none; for passes without gradients.

    PEFT turns gradients off and on with the active adapter; afterwards they are as before.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    active = policy.active_adapter
    try:
        if adapter is None:
            with policy.disable_adapter():
                yield
        else:
            policy.set_adapter(adapter)
            yield
    finally:
        if adapter is not None:
            policy.set_adapter(active)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
