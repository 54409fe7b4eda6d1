"""The frozen base as one checksum, so that a checkpoint without it can refuse another one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import xxhash
from torch import Tensor, nn

from trl_sync.quantization_state import quantization_tensors


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the base by its name: parameters, buffers and quantization state.

    Adapters are left out, and so is their trace in the names of the layers they sit on, so the
    names are those of the model before it was given adapters.
    """
    for name, tensor in (*model.named_parameters(), *quantization_tensors(model)):
        if "lora_" not in name:
            yield name.replace(".base_layer", ""), _packed_bytes(tensor)
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            # What is computed rather than loaded, such as rotary frequencies, differs by device.
            computed = name.rpartition(".")[2] in module._non_persistent_buffers_set
            if not computed and "lora_" not in name:
                yield name.replace(".base_layer", ""), buffer


def _packed_bytes(tensor: Tensor) -> Tensor:
    """4-bit weights as bytes, [n, 1]: whatever type they are stored in, they are the same base."""
    if getattr(tensor, "quant_state", None) is None:
        return tensor
    return tensor.detach().contiguous().view(torch.uint8).view(-1, 1)


def state_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `model`, adapters and heads included, by its name in `model`."""
    yield from model.named_parameters()
    yield from quantization_tensors(model)
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def fingerprint(model: nn.Module) -> str:
    """`fingerprint_of` the base tensors of `model`."""
    return fingerprint_of(base_tensors(model))


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """xxh3-128 over names, dtypes, shapes and bytes of all tensors, as 32 hex digits."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().view(-1).cpu()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
