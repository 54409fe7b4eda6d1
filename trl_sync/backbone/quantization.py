"""4-bit weights: how the base is quantized, and that its bytes stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from trl_sync.errors import ConfigError


def nf4_config(compute_dtype: torch.dtype = torch.float32) -> BitsAndBytesConfig:
    """NF4 with double quantization, computing in `compute_dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_packed_weights(model: nn.Module) -> None:
    """Switches off that bitsandbytes repacks 4-bit weights in place for inference.

    On CPUs with AVX512-BF16 the first forward in evaluation mode without gradients would round the
    scales of the frozen base to bf16, and later backward passes would not go through the layer.
    Checked on bitsandbytes 0.50.2.
    """
    for _, module in _layers_4bit(model):
        module.support_avx512bf16_for_cpu = False


def check_not_repacked(model: nn.Module) -> None:
    """Nothing, if gradients can pass every 4-bit layer.

    Raises:
        ConfigError: bitsandbytes has repacked a layer already.
    """
    for name, module in _layers_4bit(model):
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ConfigError(
                f"{name} cannot be trained through: bitsandbytes repacked its 4-bit weights when "
                "the model ran in evaluation mode on this CPU. Load the model anew."
            )


def store_packed_as(model: nn.Module, dtype: torch.dtype) -> None:
    """The packed 4-bit weights of `model` as elements of `dtype`; their bytes stay as they are.

    Weights whose bytes do not fill whole elements keep the type they have. Checked on bitsandbytes
    0.50.2, which reads bytes whatever `bnb_4bit_quant_storage` says.
    """
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if getattr(weight, "quant_state", None) is None:
            continue
        packed = weight.data.contiguous().view(-1).view(torch.uint8)
        if packed.numel() % dtype.itemsize == 0:
            weight.data = packed.view(dtype).view(-1, 1)
            weight.quant_storage = dtype
            if hasattr(module, "quant_storage"):
                vars(module)["quant_storage"] = dtype


def _layers_4bit(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            yield name, module
