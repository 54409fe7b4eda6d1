"""A model's config -> the sizes that memory depends on, counted on the meta device."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from trl_sync.backbone.logprob import knows_head
from trl_sync.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One linear layer that quantization packs and LoRA adapts: every one but the LM head."""

    inputs: int
    outputs: int

    @property
    def size(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes of a causal language model. Parameters are counted once where they are tied.

    `linears` are all linear layers but the LM head, `layer_linears` those of the largest decoder
    layer, `layer_parameters` all parameters of that layer. `embedding` counts the input embedding,
    `head` an LM head of its own (0 if tied), `small` the rest one by one: norms, biases, positions.
    """

    name: str
    model_type: str
    knows_head: bool
    hidden: int
    vocabulary: int
    num_layers: int
    query_size: int
    key_value_size: int
    intermediate: int
    linears: tuple[Linear, ...]
    layer_linears: tuple[Linear, ...]
    layer_parameters: int
    embedding: int
    head: int
    small: tuple[int, ...]

    @property
    def linear_parameters(self) -> int:
        return sum(linear.size for linear in self.linears)

    @property
    def parameters(self) -> int:
        """All parameters of the causal model."""
        return self.linear_parameters + self.dense_parameters

    @property
    def dense_parameters(self) -> int:
        """What quantization leaves in the compute dtype."""
        return self.embedding + self.head + sum(self.small)

    @property
    def layer_small_parameters(self) -> int:
        """What quantization leaves of the largest decoder layer."""
        return self.layer_parameters - sum(linear.size for linear in self.layer_linears)

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward block multiplies two projections, as in Llama's."""
        wide = [x for x in self.layer_linears if x.outputs == self.intermediate]
        joined = [x for x in self.layer_linears if x.outputs == 2 * self.intermediate]
        return len(wide) >= 2 or bool(joined)


def read_architecture(name_or_path: str) -> Architecture:
    """The architecture of the model at a hub name or in a folder; only its config is read.

    Raises:
        ConfigError: there is no config there, or not that of a causal language model.
    """
    folder = Path(name_or_path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{name_or_path} is an adapter: name the base model it was trained on instead."
        )
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"No config of a model can be read at {name_or_path} ({first}). Expected a folder "
            "with a config.json, or a name on the hub that this machine can reach."
        ) from error
    return count_architecture(config, name_or_path)


def count_architecture(config: Any, name: str = "model") -> Architecture:
    """The architecture that `config` describes, built on the meta device: no memory is taken.

    Raises:
        ConfigError: it is not that of a decoder, or lacks a size that memory depends on.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{name} is an encoder-decoder model; expected a causal language model.")
    model = _build(config, name)
    layers = _decoder_layers(model, name)
    largest = max(layers, key=_num_parameters)
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    linears = _linears(model, head)
    counted = {id(x) for module in _linear_modules(model, head) for x in [module.weight]}
    counted.add(id(embedding))
    is_tied = head is None or head.weight is embedding
    if not is_tied:
        counted.add(id(head.weight))
    small = tuple(p.numel() for p in model.parameters() if id(p) not in counted)
    hidden = int(embedding.shape[-1])
    num_heads = int(_size(config, name, "num_attention_heads"))
    head_size = getattr(config, "head_dim", None) or hidden // num_heads
    num_key_value_heads = getattr(config, "num_key_value_heads", None) or num_heads
    return Architecture(
        name=name,
        model_type=config.model_type,
        knows_head=knows_head(model),
        hidden=hidden,
        vocabulary=int(embedding.shape[0]),
        num_layers=len(layers),
        query_size=num_heads * head_size,
        key_value_size=num_key_value_heads * head_size,
        intermediate=_intermediate(config, hidden),
        linears=linears,
        layer_linears=_linears(largest, None),
        layer_parameters=_num_parameters(largest),
        embedding=embedding.numel(),
        head=0 if is_tied else head.weight.numel(),
        small=small,
    )


def _build(config: Any, name: str) -> Any:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # What a config says of training or generation is not what is asked here.
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, AttributeError, KeyError) as error:
        raise ConfigError(
            f"{name} (model type {config.model_type!r}) is not a causal language model that "
            f"transformers can build: {str(error).splitlines()[0]}"
        ) from error


def _decoder_layers(model: Any, name: str) -> list[nn.Module]:
    """The longest list of modules: the decoder layers of every causal model of transformers."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    if not lists:
        raise ConfigError(f"{name} has no list of decoder layers, so it cannot be planned for.")
    return max(lists, key=lambda layers: sum(map(_num_parameters, layers)))


def _linear_modules(module: nn.Module, head: Any) -> list[Any]:
    kinds = (nn.Linear, Conv1D)
    return [m for m in module.modules() if isinstance(m, kinds) and m is not head]


def _linears(module: nn.Module, head: Any) -> tuple[Linear, ...]:
    found = []
    for linear in _linear_modules(module, head):
        outputs, inputs = linear.weight.shape
        if isinstance(linear, Conv1D):  # which holds its weight the other way round
            inputs, outputs = outputs, inputs
        found.append(Linear(inputs=int(inputs), outputs=int(outputs)))
    return tuple(found)


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _intermediate(config: Any, hidden: int) -> int:
    for field in ("intermediate_size", "n_inner", "ffn_dim"):
        size = getattr(config, field, None)
        if size:
            return int(size)
    return 4 * hidden  # what GPT-2 and its kin mean by None


def _size(config: Any, name: str, field: str) -> int:
    value = getattr(config, field, None)
    if not isinstance(value, int):
        raise ConfigError(f"The config of {name} has no {field}, so its cache cannot be counted.")
    return value
