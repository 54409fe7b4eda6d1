"""A role of the shared backbone as a plain model on disk: base and adapter in one set of weights.

The base in memory is only read. Its 4-bit or 8-bit weights are turned into numbers one layer at a
time, the update of the adapter is added in fp32, and the sum is rounded to the dtype of the export.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from trl_sync.backbone.export import ADAPTER_WEIGHTS
from trl_sync.backbone.roles import POLICY, REFERENCE
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.errors import ConfigError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLD_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# transformers finds a model by this file, so it comes last.
_CONFIG = "config.json"


def export_merged(
    backbone: SharedBackbone,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    role: str = POLICY,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Writes `role` as a whole model that `AutoModelForCausalLM.from_pretrained(folder)` loads.

    What is written: the weights in `dtype`, `config.json` without quantization, a
    `generation_config.json` that stops at the end-of-sequence token, and the tokenizer if given.
    Tied embeddings of which one carries an adapter become two. Files of the same names in `folder`
    are replaced, and weights of an earlier export removed; nothing changes there until all is
    written. The merged weights pass through CPU memory, as much as the files are large.

    In fp32 the logits are those of the role but for rounding in another order. In 16 bits every
    weight is rounded once more, by up to 2^-8 (bfloat16) or 2^-11 (float16) of its size. The
    quantization error of a 4-bit base stays: it is the model that was trained. An 8-bit layer
    also rounds its inputs when it runs in memory; the export does not.

    With several processes, call it on one of them.

    Returns: `folder`.

    Source: `W + scaling * B A`, Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models"
    (2021), arXiv 2106.09685, equation 3.

    Raises:
        ConfigError: `backbone` is another model, `role` has no LM head, `dtype` is not one of fp32,
            bf16 and fp16 or cannot hold the weights, `folder` is a file or holds an adapter or the
            base itself, or a weight or an adapter cannot be merged.
    """
    folder = Path(folder)
    _check_arguments(backbone, folder, dtype, role)
    adapter = backbone.roles[role].adapter
    causal_model = backbone.causal_model
    model = _empty_model(causal_model, dtype, untied=_unties(causal_model, adapter))
    _set_generation_config(model, causal_model, tokenizer)
    state = _merged_state(causal_model, model, adapter, dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as written:
        model.save_pretrained(written, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        _move(Path(written), folder)
    return folder


def _check_arguments(backbone: Any, folder: Path, dtype: torch.dtype, role: str) -> None:
    if not isinstance(backbone, SharedBackbone):
        raise ConfigError(
            f"Expected a SharedBackbone, got {type(backbone).__name__}. A whole model is saved by "
            "its own save_pretrained; a PeftModel after merge_and_unload()."
        )
    if role not in (POLICY, REFERENCE):
        raise ConfigError(
            f"role={role!r} cannot be exported as a causal LM: choose {POLICY!r} or {REFERENCE!r}. "
            "The value model is saved by trainer.save_model, in value/."
        )
    if dtype not in _DTYPES:
        raise ConfigError(
            f"dtype={dtype} is not a precision for merged weights: use torch.float32, "
            "torch.bfloat16 or torch.float16."
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name a folder for the merged model.")
    if any((folder / name).exists() for name in (ADAPTER_WEIGHTS, "adapter_config.json")):
        raise ConfigError(
            f"{folder} holds an adapter, which transformers would load on top of the merged model: "
            "name another folder."
        )
    source = Path(str(getattr(backbone.config, "_name_or_path", "")))
    if folder.is_dir() and source.is_dir() and folder.samefile(source):
        raise ConfigError(
            f"{folder} is where the base was loaded from: it would be overwritten. Name another "
            "folder."
        )


def _unties(model: PreTrainedModel, adapter: str | None) -> bool:
    """Whether the embeddings share their weights and only one of them is changed by `adapter`."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if ends[0].weight is not ends[1].weight:
        return False
    return any(adapter is not None and adapter in getattr(end, "scaling", {}) for end in ends)


def _empty_model(source: PreTrainedModel, dtype: torch.dtype, *, untied: bool) -> PreTrainedModel:
    """A model like `source` without adapters, quantization and memory for its weights."""
    config = copy.deepcopy(source.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if untied:
        config.tie_word_embeddings = False
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _set_generation_config(
    model: PreTrainedModel, source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    config = copy.deepcopy(source.generation_config)
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(config, name) is None:
            of_tokenizer = getattr(tokenizer, name, None)
            of_model = getattr(source.config, name, None)
            setattr(config, name, of_model if of_tokenizer is None else of_tokenizer)
    model.generation_config = config


def _merged_state(
    source: PreTrainedModel, target: PreTrainedModel, adapter: str | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every tensor of the merged model by its name in `target`, a plain one, on the CPU."""
    layers = {
        id(layer.get_base_layer()): layer
        for layer in source.modules()
        if isinstance(layer, LoraLayer) and adapter in layer.scaling
    }
    state: dict[str, Tensor] = {}
    # Tied weights stay one tensor, so that the file holds them once.
    unchanged: dict[int, Tensor] = {}
    for name, module in _plain_modules(source):
        layer = layers.get(id(module))
        transposed = _is_transposed(module, target.get_submodule(name))
        if layer is not None:
            _check_bias(name, module, layer, adapter)
        for own, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{own}"
            if layer is None and id(parameter) in unchanged:
                state[full] = unchanged[id(parameter)]
                continue
            tensor = _as_numbers(full, module, parameter)
            if layer is not None:
                tensor = _updated(tensor, layer, adapter, own)
            if transposed and own == "weight":
                tensor = tensor.T
            state[full] = _rounded(full, tensor, dtype)
            if layer is None:
                unchanged[id(parameter)] = state[full]
        for own, buffer in module.named_buffers(recurse=False):
            if own not in module._non_persistent_buffers_set:
                state[f"{name}.{own}"] = buffer.detach().cpu().clone()
    return state


def _plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with tensors of the base, under the names they have without adapters."""
    for name, module in model.named_modules():
        own = any(True for _ in (*module.parameters(False), *module.buffers(False)))
        if own and not any(part.startswith("lora_") for part in name.split(".")):
            yield name.removesuffix(".base_layer"), module


def _is_transposed(module: nn.Module, plain: nn.Module) -> bool:
    """Whether quantizing turned a layer of GPT-2's kind, [inputs, outputs], into a linear one."""
    return isinstance(plain, Conv1D) and not isinstance(module, Conv1D)


@torch.no_grad()
def _updated(tensor: Tensor, layer: Any, adapter: str | None, own: str) -> Tensor:
    """`tensor`, the weight or bias of the base, with the adapter's update added in fp32."""
    update = _weight_update(layer, adapter) if own == "weight" else _bias_update(layer, adapter)
    return tensor if update is None else tensor.float() + update.to(tensor.device)


def _weight_update(layer: Any, adapter: str | None) -> Float[Tensor, "rows columns"]:
    """`scaling * B A` in the layout of the layer's weight (Hu et al. 2021, equation 3)."""
    scaling: float = layer.scaling[adapter]
    if adapter in layer.lora_embedding_A:
        down, up = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return (up.float() @ down.float()).T * scaling
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    update: Tensor = up.float() @ down.float() * scaling
    return update.T if layer.fan_in_fan_out else update


def _bias_update(layer: Any, adapter: str | None) -> Float[Tensor, " rows"] | None:
    """The part of the update that does not depend on the input; None without `lora_bias`."""
    if adapter not in layer.lora_B or layer.lora_B[adapter].bias is None:
        return None
    bias: Tensor = layer.lora_B[adapter].bias.float() * layer.scaling[adapter]
    return bias


def _check_bias(name: str, base: nn.Module, layer: Any, adapter: str | None) -> None:
    if _bias_update(layer, adapter) is not None and getattr(base, "bias", None) is None:
        raise ConfigError(
            f"{name} has no bias that the adapter's could be added to, so the two cannot be "
            "merged. Train with lora_bias=False, or use the adapter as it is."
        )


@torch.no_grad()
def _as_numbers(name: str, module: nn.Module, parameter: nn.Parameter) -> Tensor:
    """`parameter` in a floating point dtype, dequantized if it is packed."""
    if parameter.device.type == "meta":
        raise ConfigError(
            f"{name} is not in memory (offloaded): load the base whole on one device to export it."
        )
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return bitsandbytes.functional.dequantize_4bit(parameter.data, state)
    scales = getattr(parameter, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if scales is not None:
        return parameter.data.float() * scales.to(parameter.device).float().unsqueeze(1) / 127
    if not parameter.is_floating_point():
        raise ConfigError(
            f"{name} is stored as {parameter.dtype}, a quantization that cannot be merged. "
            "Supported: bitsandbytes in 4 and 8 bits."
        )
    return parameter.detach()


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of `tensor` in `dtype`, on the CPU."""
    rounded = tensor.detach().to(dtype).cpu()
    if not torch.isfinite(rounded).all():
        largest = tensor.abs().max().item()
        raise ConfigError(
            f"{name} does not fit {dtype}: its largest weight is {largest:g}. Use torch.bfloat16 "
            "or torch.float32."
        )
    return rounded.contiguous()


def _move(source: Path, folder: Path) -> None:
    """The files of `source` into `folder` in place of those with the same names."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(source.iterdir(), key=lambda file: (file.name == _CONFIG, file.name))
    new = {file.name for file in files}
    for old in folder.iterdir():
        if _OLD_WEIGHTS.fullmatch(old.name) and old.name not in new:
            old.unlink()
    for file in files:
        os.replace(file, folder / file.name)
