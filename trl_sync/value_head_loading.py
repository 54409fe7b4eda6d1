"""Loading the model that a value head is put on, and the checks of its arguments."""

from __future__ import annotations

from typing import Any

from peft import (
    PeftConfig,
    PeftModel,
    PromptLearningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import BitsAndBytesConfig

from trl_sync.backbone.adapter_files import adapter_config, applying
from trl_sync.backbone.checkpointing import enable_checkpointing
from trl_sync.backbone.quantization import keep_packed_weights
from trl_sync.errors import ConfigError
from trl_sync.value_head_files import find_file


def load_model(
    parent_class: Any,
    source: str,
    model_args: tuple[Any, ...],
    options: dict[str, Any],
    peft_config: Any,
    *,
    is_trainable: bool,
    device: Any,
) -> Any:
    """The model of that path or hub name; of an adapter's folder its base with the adapter.

    A quantized model goes to `device` if `options` do not say where.

    Raises:
        ConfigError: `peft_config` is given for an adapter, its base is not known, or its files
            cannot be read or belong to another model.
    """
    options = _with_quantization_config(options)
    if options.get("quantization_config") is not None:
        options.setdefault("device_map", {"": device})
    adapter = find_file(source, "adapter_config.json", options)
    if adapter is None:
        return parent_class.from_pretrained(source, *model_args, **options)
    if peft_config is not None:
        raise ConfigError(
            f"{source} holds a trained adapter, so peft_config would have no effect: leave it "
            "out, and pass is_trainable=True to train that adapter further."
        )
    config = adapter_config(adapter.parent)
    base = config.base_model_name_or_path
    if not base:
        raise ConfigError(
            f"The adapter in {source} does not say which model it belongs to: load that model "
            "and the adapter with peft.PeftModel.from_pretrained, and pass the result."
        )
    model = parent_class.from_pretrained(base, *model_args, **options)
    keep_packed_weights(model)
    with applying(adapter.parent, config, model):
        return PeftModel.from_pretrained(
            model, str(adapter.parent), is_trainable=is_trainable, token=options.get("token")
        )


def hidden_size(config: Any) -> int:
    """The size of the last hidden state, from a model's config.

    Raises:
        ConfigError: it does not tell.
    """
    decoder = getattr(config, "decoder", None)
    candidates = (
        getattr(config, "word_embed_proj_dim", None),  # OPT: what its last projection returns
        getattr(config, "hidden_size", None),
        getattr(getattr(config, "text_config", None), "hidden_size", None),
        getattr(decoder, "hidden_size", None),
    )
    for size in candidates:
        if size is not None:
            return int(size)
    raise ConfigError(
        f"The config of {type(config).__name__} does not tell the size of the hidden states: it "
        "needs hidden_size, word_embed_proj_dim, text_config.hidden_size or decoder.hidden_size."
    )


def check_adapters(peft_config: Any, reward_adapter: Any) -> None:
    """Nothing, if these arguments of `from_pretrained` are of the right type.

    Raises:
        ConfigError: they are not.
    """
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config must be a peft.PeftConfig, got {type(peft_config).__name__}."
        )
    if isinstance(peft_config, PromptLearningConfig):
        raise ConfigError("Prompt learning is not supported in PPO: use LoRA.")
    if reward_adapter is not None and not isinstance(reward_adapter, str):
        raise ConfigError(
            "reward_adapter must be the path or hub name of an adapter, got "
            f"{type(reward_adapter).__name__}."
        )


def check_adapter_kind(model: Any, reward_adapter: Any) -> None:
    """Nothing, if the model can have a value head and this reward adapter.

    Raises:
        ConfigError: it cannot.
    """
    if not isinstance(model, PeftModel):
        if reward_adapter is not None:
            raise ConfigError("reward_adapter needs a PEFT model: pass peft_config too.")
    elif isinstance(model.active_peft_config, PromptLearningConfig):
        raise ConfigError("Prompt learning is not supported in PPO: use LoRA.")


def check_model_object(
    model: Any, peft_config: Any, model_args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Nothing, if these arguments have an effect on a model that is loaded already.

    Raises:
        ConfigError: one has none.
    """
    if peft_config is not None and isinstance(model, PeftModel):
        raise ConfigError("The model is a PEFT model already: leave out peft_config.")
    options = {name: value for name, value in options.items() if name != "token"}
    if model_args or options:
        raise ConfigError(
            f"{', '.join(options) or model_args} has no effect on a model that is loaded already: "
            "pass the path instead, or load the model with it."
        )


def _with_quantization_config(options: dict[str, Any]) -> dict[str, Any]:
    """`load_in_8bit` and `load_in_4bit`, which transformers no longer takes, as a config."""
    options = dict(options)
    flags = {k: options.pop(k) for k in ("load_in_8bit", "load_in_4bit") if k in options}
    if any(flags.values()):
        options["quantization_config"] = BitsAndBytesConfig(**flags)
    return options


def with_adapter(model: Any, peft_config: Any, kbit_options: dict[str, Any]) -> Any:
    """The model with a new adapter; a quantized one is prepared for training first.

    Raises:
        ConfigError: options of that preparation for a model that is not quantized.
    """
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if kbit_options.get("use_gradient_checkpointing", True):
            model.enable_input_require_grads()
            enable_checkpointing(model, kbit_options.get("gradient_checkpointing_kwargs"))
    elif kbit_options:
        raise ConfigError(f"{', '.join(kbit_options)} has an effect on quantized models only.")
    return get_peft_model(model, peft_config)
