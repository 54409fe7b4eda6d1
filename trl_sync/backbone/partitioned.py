"""Models that DeepSpeed's ZeRO-3 partitions while transformers loads them, made whole again.

As soon as training arguments with ZeRO-3 exist, `from_pretrained` gives each rank a part of every
parameter. Adapters and heads are made from whole ones, frozen reward models run outside the engine,
and the engine partitions what it takes anyway. Checked on transformers 5.23 and deepspeed 0.19.8.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers.integrations import deepspeed as integration


@contextlib.contextmanager
def loaded_whole() -> Iterator[None]:
    """Within the block `from_pretrained` loads models as without DeepSpeed."""
    reference = integration._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            integration.set_hf_deepspeed_config(config)


def make_whole(model: nn.Module) -> None:
    """Gives `model` whole parameters in place of partitions; a collective if it has any.

    Parameters that several modules share stay shared.
    """
    partitions = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not partitions:
        return
    import deepspeed

    whole: dict[int, nn.Parameter] = {}
    for parameter in partitions:
        with deepspeed.zero.GatheredParameters([parameter]), torch.no_grad():
            value = parameter.detach().clone()
        whole[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in whole:
                setattr(module, name, whole[id(parameter)])
