"""AdapterRouter: one pass through the base, each slice of the batch through its own adapter.

PEFT's own way to use several adapters is to switch the active one. That turns off `requires_grad`
on the others, and under gradient checkpointing the first role's layers are recomputed with the
last role's adapter: wrong gradients without an error. Here the active adapters stay empty, so the
layers return the base's output, and a forward hook adds each slice's own low-rank update.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from trl_sync.backbone.low_rank import LowRank, add_low_rank
from trl_sync.errors import ConfigError

# One entry per equal slice of the batch: the adapter's name, or None for the base alone.
Routes = tuple[str | None, ...]

# The only fields of a LoraConfig that may differ from their defaults: each one is either handled by
# the routing hook or changes only which layers get an adapter, with which rank and scale.
_SUPPORTED_FIELDS = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "fan_in_fan_out", "init_lora_weights", "lora_bias"),
        *("megatron_core", "runtime_config", "qalora_group_size", "loftq_config"),
    }
)
# The others (pissa, olora, loftq, eva, corda) rewrite the base, which is also the reference.
_SUPPORTED_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


def check_lora_config(config: Any) -> None:
    """Nothing, if the routing computes exactly what PEFT would for `config`.

    Raises:
        ConfigError: names the option that is not supported.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"peft_config must be a LoraConfig, got {type(config).__name__}: roles share the base "
            "through LoRA adapters. Other PEFT types are not supported."
        )
    if config.use_dora:
        raise ConfigError("use_dora=True is not supported: set use_dora=False.")
    if config.bias != "none":
        raise ConfigError(
            f'bias="{config.bias}" trains biases of the base, which the reference and the value '
            'model share: set bias="none".'
        )
    if config.modules_to_save:
        raise ConfigError(
            f"modules_to_save={list(config.modules_to_save)} trains whole modules of the base that "
            "the roles share: remove it. The value head is trained without it."
        )
    if config.init_lora_weights not in _SUPPORTED_INITIALISATIONS:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported, because it may "
            "change the base, which serves as the reference: use one of "
            f"{_SUPPORTED_INITIALISATIONS}."
        )
    default = LoraConfig()
    for name in vars(default):
        value = getattr(config, name, None)
        supported = name in _SUPPORTED_FIELDS or name.startswith("_")
        if not supported and value != getattr(default, name):
            raise ConfigError(
                f"LoRA option {name}={value!r} is not supported on a shared backbone: remove it."
            )


@functools.cache
def _supported_layers() -> tuple[type[nn.Module], ...]:
    kinds: list[type[nn.Module]] = [lora.Linear, lora.Embedding]
    for name in ("Linear4bit", "Linear8bitLt"):
        kind = getattr(lora, name, None)
        if kind is not None:
            kinds.append(kind)
    return tuple(kinds)


class AdapterRouter:
    """Sends equal, contiguous slices of the batch through different LoRA adapters of one model.

    The router attaches forward hooks to every LoRA layer of `model`. Outside of `routes(...)` the
    layers compute the base alone.

    Raises:
        ConfigError: a LoRA layer is of a kind that the routing does not implement.
    """

    def __init__(self, model: PeftModel) -> None:
        self.active: Routes = ()
        self._plans: dict[LoraLayer, _Plan] = {}
        self.layers: list[LoraLayer] = []
        self.watch_layers(model)
        if not self.layers:
            raise ConfigError("The model has no LoRA layer: check target_modules in peft_config.")

    def watch_layers(self, model: PeftModel) -> None:
        """Takes over every LoRA layer of `model`, also those of an adapter that was added since.

        Raises:
            ConfigError: a LoRA layer is of a kind that the routing does not implement.
        """
        known = {id(layer) for layer in self.layers}
        layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        for name, layer in layers.items():
            if not isinstance(layer, _supported_layers()):
                raise ConfigError(
                    f"{name} is a {type(layer).__name__}, which the routing does not "
                    "implement. Supported: Linear, 4-bit and 8-bit bitsandbytes, Embedding."
                )
        for layer in layers.values():
            # PEFT adds the updates of the active adapters itself; the hook must be the only one.
            layer._active_adapter = []
            if id(layer) not in known:
                layer.register_forward_hook(self._add_updates)
                self.layers.append(layer)

    @contextlib.contextmanager
    def routes(self, *adapters: str | None) -> Iterator[None]:
        """Within the block the batch is cut into `len(adapters)` equal slices, one for each."""
        previous = self.active, self._plans
        self.active, self._plans = adapters, {}
        try:
            yield
        finally:
            self.active, self._plans = previous

    def checkpoint_contexts(self) -> tuple[Any, Any]:
        """The contexts of a checkpointed forward and of its recomputation, for `context_fn`.

        Backward runs after `routes(...)` has ended; the recomputation must see the same slices.
        """
        return contextlib.nullcontext(), self.routes(*self.active)

    def _add_updates(self, layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        plan = self._plans.get(layer)
        if plan is None:
            plan = self._plans[layer] = _Plan.of(layer, self.active)
        if not plan.changes_output:
            return output
        source, num_slices = args[0], len(plan.adapters)
        if source.shape[0] % num_slices:
            raise AssertionError(f"{source.shape[0]} rows do not split into {num_slices} slices")
        if plan.products is not None:
            return _add_in_place(plan.products, source, output, dropout=plan.dropout)
        slices = zip(plan.adapters, source.chunk(num_slices), output.chunk(num_slices), strict=True)
        return torch.cat(
            [
                base if adapter is None else base + _update(layer, adapter, part).to(base.dtype)
                for adapter, part, base in slices
            ]
        )


# The two linear maps of a low-rank update, the thin one first, and its scaling.
_Products = tuple[Any, Any, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What a layer does while certain routes are active: found once, used at every token.

    `adapters` are those of the slices that the layer has, `products` theirs if all the updates can
    be added in place, with one rate of `dropout`.
    """

    adapters: Routes
    products: tuple[_Products | None, ...] | None = None
    dropout: float = 0.0

    @classmethod
    def of(cls, layer: Any, routes: Routes) -> _Plan:
        adapters = tuple(adapter if adapter in layer.scaling else None for adapter in routes)
        chosen = [adapter for adapter in adapters if adapter is not None]
        if not chosen or not all(_is_plain(layer, adapter) for adapter in chosen):
            return cls(adapters=adapters)
        rates = {_dropout_rate(layer, adapter) for adapter in chosen}
        if rates != {0.0} and (len(rates) > 1 or len(chosen) < len(adapters)):
            return cls(adapters=adapters)

        def products(adapter: str) -> _Products:
            return layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]

        return cls(
            adapters=adapters,
            products=tuple(None if name is None else products(name) for name in adapters),
            dropout=rates.pop(),
        )

    @property
    def changes_output(self) -> bool:
        return any(adapter is not None for adapter in self.adapters)


def _is_plain(layer: Any, adapter: str) -> bool:
    """Whether the update is two products, dropout apart, with the weights at hand."""
    if adapter in layer.lora_embedding_A:
        return False
    dropout, up = layer.lora_dropout[adapter], layer.lora_B[adapter]
    # DeepSpeed gathers partitioned weights (`ds_id`) only where their module is called.
    return (
        isinstance(dropout, (nn.Dropout, nn.Identity))
        and up.bias is None
        and not hasattr(up.weight, "ds_id")
    )


def _dropout_rate(layer: Any, adapter: str) -> float:
    dropout = layer.lora_dropout[adapter]
    return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _add_in_place(
    products: Sequence[_Products | None], source: Tensor, output: Tensor, *, dropout: float
) -> Tensor:
    kind = source.device.type
    # What autocast would compute the products in, and else the adapter's own type.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def low_rank(thin: Any, wide: Any, scaling: float) -> LowRank:
        down, up = thin.weight, wide.weight
        if dtype is not None:
            down, up = down.to(dtype), up.to(dtype)
        return LowRank(down=down, up=up, scaling=scaling)

    updates = [None if of_slice is None else low_rank(*of_slice) for of_slice in products]
    wanted = next(update.down.dtype for update in updates if update is not None)
    # One draw for all slices: every element has its own chance anyway.
    source = functional.dropout(source.to(wanted), dropout, training=dropout > 0)
    return add_low_rank(output, source, updates)


def _update(layer: Any, adapter: str | None, source: Tensor) -> Tensor:
    """The low-rank update of one adapter for one slice: `scaling * B(A(dropout(x)))`."""
    scaling: float = layer.scaling[adapter]
    if adapter in layer.lora_embedding_A:
        base = layer.get_base_layer()
        rows = functional.embedding(
            source, layer.lora_embedding_A[adapter].T, padding_idx=base.padding_idx
        )
        # Some embeddings multiply their rows, which the low-rank update must follow.
        scaling = scaling * getattr(base, "embed_scale", 1.0)
        return rows @ layer.lora_embedding_B[adapter].T * scaling
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    if not torch.is_autocast_enabled(source.device.type):
        source = source.to(down.weight.dtype)
    update: Tensor = up(down(layer.lora_dropout[adapter](source))) * scaling
    return update


def adapter_parameters(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The named LoRA parameters that belong to `adapter`."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and adapter in name.split("."):
            yield name, parameter


def set_adapter_trainable(model: nn.Module, adapters: Sequence[str]) -> None:
    """Only the LoRA parameters of `adapters` require gradients, in all of `model`."""
    trainable = {id(p) for adapter in adapters for _, p in adapter_parameters(model, adapter)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trainable)


CheckpointContexts = Callable[[], tuple[Any, Any]]
