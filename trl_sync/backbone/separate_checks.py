"""What models cannot be policy or value model, and what to pass instead."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from trl_sync.backbone.scalar_head import find_scalar_head, without_adapters
from trl_sync.errors import ConfigError


def encoder_decoder_error(model: Any) -> ConfigError:
    """What to say of a model that PPOTrainer does not train, though the step API does."""
    return ConfigError(
        f"{type(model).__name__} is an encoder-decoder model, which PPOTrainer does not train: use "
        "a causal LM, or trl_sync.legacy with AutoModelForSeq2SeqLMWithValueHead."
    )


def check_policy(policy: Any, peft_config: Any, *, has_reference: bool = True) -> None:
    """Nothing, if `policy` is a causal LM that can train.

    Raises:
        ConfigError: it is another kind of model, has adapters that do not work here, or too few.
    """
    if not isinstance(policy, (PreTrainedModel, PeftModel)):
        raise ConfigError(f"model must be a causal LM, got {type(policy).__name__}{_hint(policy)}.")
    inner = without_adapters(policy)
    if getattr(inner.config, "is_encoder_decoder", False):
        raise encoder_decoder_error(inner)
    if inner.get_output_embeddings() is None:
        raise ConfigError(f"{type(inner).__name__} has no LM head: load an AutoModelForCausalLM.")
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config must be a PeftConfig such as {LoraConfig.__name__}, got "
            f"{type(peft_config).__name__}."
        )
    if isinstance(policy, PeftModel):
        _check_peft_model(policy, peft_config, has_reference)
    elif getattr(policy, "_hf_peft_config_loaded", False):
        raise ConfigError(
            "transformers loaded an adapter into the model by itself: load the base, and the "
            "adapter with PeftModel.from_pretrained(base, path, is_trainable=True)."
        )
    elif peft_config is not None:
        _check_adapter(peft_config, has_reference)
    elif getattr(policy, "is_quantized", False):
        raise ConfigError(
            "The model is quantized, and quantized weights do not train: pass peft_config."
        )
    else:
        _check_generation_config(policy)


def check_reference(ref_model: Any) -> None:
    """Nothing, if `ref_model` is a causal LM or None.

    Raises:
        ConfigError: it is something else.
    """
    if ref_model is None:
        return
    inner = without_adapters(ref_model)
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise ConfigError(
            f"ref_model must be a causal LM or None, got {type(inner).__name__}: load an "
            "AutoModelForCausalLM, or leave it out."
        )


def check_adapter_names(
    policy: Any, peft_config: Any, model_name: str | None, reference_name: str | None
) -> None:
    """Nothing, if the named adapters exist and are two.

    Raises:
        ConfigError: names the setting.
    """
    if not isinstance(policy, PeftModel):
        if reference_name is not None:
            raise ConfigError(
                f"ref_adapter_name={reference_name!r} has no effect: the model has no adapters "
                "yet. Leave it unset."
            )
        if model_name is not None and peft_config is None:
            raise ConfigError(
                f"model_adapter_name={model_name!r} has no effect: the model has no adapters. "
                "Leave it unset, or pass peft_config."
            )
        return
    for setting, name in (("model_adapter_name", model_name), ("ref_adapter_name", reference_name)):
        if name is not None and name not in policy.peft_config:
            raise ConfigError(
                f"{setting}={name!r} is no adapter of the model, which has "
                f"{sorted(policy.peft_config)}."
            )
    trained = model_name or policy.active_adapter
    if reference_name == trained:
        raise ConfigError(
            f"ref_adapter_name={reference_name!r} is the adapter that trains: set "
            "model_adapter_name to the other one."
        )


def check_disjoint(policy: Any, value_model: Any, ref_model: Any) -> None:
    """Nothing, if no parameter belongs to two of the models.

    Raises:
        ConfigError: names two models that share one.
    """
    owners: dict[int, str] = {}
    named = {"policy": policy, "value model": value_model, "reference": ref_model}
    for name, model in named.items():
        own = {} if model is None else {id(p): key for key, p in model.named_parameters()}
        for parameter, key in own.items():
            if parameter in owners:
                raise ConfigError(
                    f"{key} belongs to {owners[parameter]} and {name}: load the model twice. For "
                    "the policy as it is at the beginning pass ref_model=None."
                )
        owners |= dict.fromkeys(own, name)


def _check_peft_model(policy: PeftModel, peft_config: Any, has_reference: bool) -> None:
    if peft_config is not None:
        raise ConfigError(
            "The model has adapters already, and peft_config would add others on top: merge "
            "and unload them first, or leave out peft_config."
        )
    if len(policy.active_adapters) != 1:
        raise ConfigError(
            f"The adapters {policy.active_adapters} are active, and exactly one can train: call "
            "set_adapter(name), or combine them with add_weighted_adapter."
        )
    _check_adapter(policy.active_peft_config, has_reference)


def _check_adapter(config: PeftConfig, has_reference: bool) -> None:
    kind = config.peft_type
    if config.is_prompt_learning:
        raise ConfigError(
            f"{kind} adapters add prompt tokens, which would move every response: use LoRA or "
            "another kind that changes layers."
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ConfigError(
            "alora_invocation_tokens switch the adapter on inside a sequence, which is not "
            "supported: leave them unset."
        )
    if getattr(config, "bias", "none") != "none" and not has_reference:
        raise ConfigError(
            f"bias={config.bias!r} trains biases of the base, which is also the reference: pass "
            'ref_model, or set bias="none".'
        )


def _check_generation_config(policy: Any) -> None:
    """Nothing, if the model's generation config can be saved with it."""
    try:
        policy.generation_config.validate(strict=True)
    except ValueError as error:
        raise ConfigError(
            f"The model's generation config is invalid, so the model could not be saved: {error}"
        ) from error


def _hint(model: Any) -> str:
    """What to do with a model that has a value head of its own."""
    if not hasattr(model, "v_head"):
        return ""
    return (
        ": pass its .pretrained_model; to keep the value head, load the whole a second time as "
        "value_model; or use trl_sync.legacy"
    )


def check_value_model(value_model: Any) -> None:
    """Nothing, if `value_model` says one number a token.

    Raises:
        ConfigError: it has no scalar head.
    """
    head = find_scalar_head(value_model) if isinstance(value_model, nn.Module) else None
    if head is None:
        raise ConfigError(
            f"value_model is a {type(value_model).__name__} without a `score` head or a `v_head`: "
            "use an AutoModelForSequenceClassification with num_labels=1."
        )
    inner = without_adapters(value_model)
    labels = 1 if hasattr(inner, "v_head") else getattr(inner.config, "num_labels", 1)
    if labels != 1:
        raise ConfigError(
            f"value_model has {labels} labels, but a value is one number: use num_labels=1."
        )
