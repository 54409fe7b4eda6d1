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


def check_policy(policy: Any, peft_config: Any) -> None:
    """Nothing, if `policy` is a causal LM that can train.

    Raises:
        ConfigError: it is another kind of model, or has too many adapters or too few.
    """
    if not isinstance(policy, (PreTrainedModel, PeftModel)):
        raise ConfigError(f"model must be a causal LM, got {type(policy).__name__}{_hint(policy)}.")
    inner = without_adapters(policy)
    if getattr(inner.config, "is_encoder_decoder", False):
        raise encoder_decoder_error(inner)
    if inner.get_output_embeddings() is None:
        raise ConfigError(f"{type(inner).__name__} has no LM head: load an AutoModelForCausalLM.")
    if isinstance(policy, PeftModel):
        if peft_config is not None:
            raise ConfigError(
                "The model has adapters already, and peft_config would add others on top: merge "
                "and unload them first, or leave out peft_config."
            )
        if policy.active_peft_config.is_prompt_learning:
            raise ConfigError(
                f"{policy.active_peft_config.peft_type} adapters add prompt tokens, which would "
                "move every response: use LoRA or another kind that changes layers."
            )
    elif getattr(policy, "is_quantized", False) and peft_config is None:
        raise ConfigError(
            "The model is quantized, and quantized weights do not train: pass peft_config."
        )
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config must be a PeftConfig such as {LoraConfig.__name__}, got "
            f"{type(peft_config).__name__}."
        )


def _hint(model: Any) -> str:
    """What to do with a model that has a value head of its own."""
    if not hasattr(model, "v_head"):
        return ""
    return ": pass its .pretrained_model and the whole as value_model, or use trl_sync.legacy"


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
    labels = head.head_weight.shape[0]
    if labels != 1:
        raise ConfigError(
            f"value_model has {labels} labels, but a value is one number: use num_labels=1."
        )
