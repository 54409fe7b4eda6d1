"""The models a trainer was given -> one module that plays policy, value model and reference."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from trl_sync.backbone.partitioned import make_whole
from trl_sync.backbone.roles import POLICY, REFERENCE
from trl_sync.backbone.scalar_head import without_adapters
from trl_sync.backbone.separate import SeparateModels
from trl_sync.backbone.separate_checks import (
    check_policy,
    check_reference,
    check_value_model,
    encoder_decoder_error,
)
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.errors import ConfigError
from trl_sync.ppo.config import PPOConfig
from trl_sync.ppo.prompts import check_tokenizer
from trl_sync.ppo.rewards.models import language_model_of, model_name
from trl_sync.ppo.rewards.tokens import find_tokenizer, vocabulary_difference

Models = SharedBackbone | SeparateModels


def make_all_whole(*models: Any) -> None:
    """Gives models that ZeRO-3 partitioned while they were loaded whole parameters. A collective.

    Lists of rewards, paths and functions may be among them.
    """
    for given in models:
        for model in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(model, nn.Module):
                make_whole(model)


def check_models(
    args: PPOConfig,
    model: Any,
    ref_model: Any,
    value_model: Any,
    peft_config: Any,
    reward_model: Any = None,
) -> None:
    """Nothing, if the models make up a shared backbone, or four models as in TRL.

    Raises:
        ConfigError: names the model and what to pass instead.
    """
    if ref_model is not None and ref_model is model:
        raise ConfigError(
            "model and ref_model are the same object: the reference would train with the policy. "
            "Pass ref_model=None: without it the reference is the policy as it is now."
        )
    rewards = reward_model if isinstance(reward_model, (list, tuple)) else [reward_model]
    for name, trained in (("model", model), ("value_model", value_model)):
        if isinstance(trained, nn.Module) and any(reward is trained for reward in rewards):
            raise ConfigError(
                f"{name} and reward_model are the same object: the reward would change while it "
                "trains. Load it twice."
            )
    if isinstance(model, Models):
        _check_prepared(model, ref_model, value_model, peft_config)
    elif value_model is not None:
        check_policy(model, peft_config, has_reference=ref_model is not None)
        check_value_model(value_model)
        check_reference(ref_model)
    else:
        _check_base(model, ref_model, peft_config)
    if value_model is None:
        _check_adapter_names(args)


def build_models(
    args: PPOConfig, model: Any, ref_model: Any, value_model: Any, peft_config: Any
) -> Models:
    """What `check_models` let pass as one module. Adapters are drawn here."""
    if isinstance(model, Models):
        return model
    if value_model is None:
        return SharedBackbone(model, peft_config)
    return SeparateModels(
        model,
        value_model,
        ref_model,
        peft_config,
        model_adapter_name=args.model_adapter_name,
        ref_adapter_name=args.ref_adapter_name,
    )


def causal_model_of(model: Any) -> PreTrainedModel:
    """The causal LM whose tokens are trained on."""
    return model.causal_model if isinstance(model, Models) else without_adapters(model)


def check_tokens(tokenizer: Any, model: Any, ref_model: Any, value_model: Any) -> int | None:
    """The longest sequence that every model takes, if all of them know the tokenizer's ids.

    None if no model tells.

    Raises:
        ConfigError: a model has too few embeddings, or the value model another vocabulary.
    """
    if isinstance(model, SeparateModels):
        ref_model, value_model = model.ref_model, model.value_model
    given = {"model": causal_model_of(model), "reference": ref_model, "value model": value_model}
    inner = {name: language_model_of(part) for name, part in given.items() if part is not None}
    for name, part in inner.items():
        check_tokenizer(tokenizer, part.get_input_embeddings().weight.shape[0], name)
    if value_model is not None:
        path = model_name(value_model)
        own = find_tokenizer(path) if path else None
        difference = None if own is None else vocabulary_difference(own, tokenizer)
        if difference is not None:
            raise ConfigError(
                f"The value model in {path} has another vocabulary ({difference}), and reads the "
                "policy's tokens: make it from a model with the policy's tokenizer."
            )
    contexts = [getattr(part.config, "max_position_embeddings", None) for part in inner.values()]
    return min((n for n in contexts if n is not None), default=None)


def _check_prepared(model: nn.Module, ref_model: Any, value_model: Any, peft_config: Any) -> None:
    kind = type(model).__name__
    given = {"ref_model": ref_model, "value_model": value_model, "peft_config": peft_config}
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{name} was given with a {kind}, which has all its models and adapters already: "
                f"give it to the {kind} instead."
            )


def _check_base(model: Any, ref_model: Any, peft_config: Any) -> None:
    """Nothing, if `model` can become the base that the roles share."""
    if ref_model is not None:
        raise ConfigError(
            "ref_model was given without value_model. On a shared backbone the reference is a view "
            "of the base: pass ref_model=None. For models of their own pass value_model too."
        )
    if without_adapters(model) is not model or getattr(model, "peft_config", None):
        raise ConfigError(
            "The model already has adapters"
            + (", and peft_config would add others on top" if peft_config is not None else "")
            + ". For a shared backbone load base and SFT adapter with "
            "trl_sync.load_shared_backbone; or pass a value_model of its own."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise encoder_decoder_error(model)
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"model must be a causal LM or a SharedBackbone, got {type(model).__name__}. Of one "
            "with a value head pass .pretrained_model, or use trl_sync.legacy."
        )


def _check_adapter_names(args: PPOConfig) -> None:
    for name, own in (("model_adapter_name", POLICY), ("ref_adapter_name", REFERENCE)):
        if getattr(args, name) not in (None, own):
            raise ConfigError(
                f"{name}={getattr(args, name)!r} is not supported: on a shared backbone that "
                f"adapter is called {own!r}. Leave {name} unset."
            )
