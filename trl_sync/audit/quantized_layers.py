"""Where quantized layers keep what is neither parameter nor buffer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl_sync.quantization_state import quantization_tensors


def all_quantization_tensors(
    module: nn.Module, beside: Sequence[tuple[str, nn.Module]]
) -> Iterator[tuple[str, Tensor]]:
    """The quantization state of every weight; of the layers `beside`, what the layer holds."""
    owners = {join_names(name, "weight") for name, _ in beside}
    for name, tensor in quantization_tensors(module):
        if name.rpartition(".")[0] not in owners:
            yield name, tensor
    for name, layer in beside:
        carrier: Any = nn.Module()
        carrier.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        carrier.weight.quant_state = layer.quant_state
        for part, tensor in quantization_tensors(carrier):
            yield join_names(name, part), tensor


def states_beside_weights(
    model: nn.Module, fsdp_places: Mapping[tuple[int, str], Any]
) -> list[tuple[str, nn.Module]]:
    """4-bit layers whose weight carries no quantization state of its own: FSDP2 sharded it."""
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if (id(layer), "weight") in fsdp_places and vars(layer).get("quant_state") is not None
    ]


def packed_buffers(module: nn.Module) -> set[int]:
    """Buffers that are frozen weights: those of layers quantized by GPTQ, AWQ or HQQ."""
    return {
        id(buffer)
        for layer in module.modules()
        if {"qweight", "W_q"} & set(layer._buffers)
        for buffer in layer.buffers(recurse=False)
    }


def join_names(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
