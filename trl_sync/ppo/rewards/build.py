"""What the user gave as reward -> one reward source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trl_sync.backbone.loading import load_reward_model
from trl_sync.backbone.shared import SharedBackbone
from trl_sync.errors import ConfigError
from trl_sync.ppo.rewards.adapter import AdapterReward, belongs_on
from trl_sync.ppo.rewards.functions import FunctionReward, RewardFunction
from trl_sync.ppo.rewards.models import ModelReward, check_reward_tokenizer, model_name
from trl_sync.ppo.rewards.source import Source
from trl_sync.ppo.rewards.weighted import WeightedRewards, distinct

OneReward = nn.Module | RewardFunction | str
AnyReward = OneReward | Sequence[OneReward] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardContext:
    """What reward sources are made with. `base` may carry a reward adapter, see `reward_source`."""

    tokenizer: PreTrainedTokenizerBase
    conversational: bool
    batch_size: int
    device: torch.device
    trainer_state: Callable[[], Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    base: Any = None


def reward_source(
    reward: AnyReward,
    tokenizer: PreTrainedTokenizerBase,
    *,
    conversational: bool,
    batch_size: int,
    device: torch.device,
    processing_classes: Any = None,
    weights: Sequence[float] | None = None,
    trainer_state: Callable[[], Any] | None = None,
    chat_template_kwargs: Any = None,
    base: Any = None,
) -> Source:
    """One reward source from a model, its path or hub name, a function, or a list of these.

    `processing_classes` is one tokenizer or a list like that of the rewards (None for functions):
    a model with one is fed text that it tokenizes. `weights` are those of the sum, 1.0 each if not
    given. `base` is a `SharedBackbone` or the causal LM that becomes one: a path of an adapter on
    that very base becomes its reward adapter, for `attach_adapter`, instead of a second base in
    memory; and a `SharedBackbone` that has a reward adapter needs no `reward`.

    Raises:
        ConfigError: nothing was given, a model that cannot score sequences, or lists that differ in
            length.
    """
    context = RewardContext(
        tokenizer=tokenizer,
        conversational=conversational,
        batch_size=batch_size,
        device=device,
        trainer_state=trainer_state,
        chat_template_kwargs=chat_template_kwargs,
        base=base,
    )
    has_adapter = isinstance(base, SharedBackbone) and base.has_reward
    if reward is None and not has_adapter:
        raise ConfigError(
            "No reward source: pass reward_model, a sequence classifier or a function "
            "(prompts, completions, **columns) -> list of floats."
        )
    rewards: list[Any] = list(reward) if isinstance(reward, (list, tuple)) else [reward]
    if not rewards:
        raise ConfigError("reward_model is an empty list: name at least one reward source.")
    tokenizers = _one_each(processing_classes, rewards)
    _check_weights(weights, rewards)
    pairs = zip(rewards, tokenizers, strict=True)
    sources = [_one_source(item, own, context) for item, own in pairs]
    if sum(isinstance(source, AdapterReward) for source in sources) > 1:
        raise ConfigError(
            "Several reward adapters of this base were given, but the base carries one: load the "
            "others with trl_sync.load_reward_model, on a base of their own."
        )
    if len(sources) == 1 and weights is None:
        return sources[0]
    names = distinct([_label(*pair) for pair in zip(rewards, sources, strict=True)])
    return WeightedRewards(sources, weights or [1.0] * len(sources), names)


def sources_in(source: Any) -> Iterator[Any]:
    """`source`, or each of those that it adds up."""
    yield from source.sources if isinstance(source, WeightedRewards) else (source,)


def reward_modules(source: Any) -> dict[str, nn.Module]:
    """The frozen reward models in `source` by distinct names; not what lies on a shared base."""
    found = [part for part in sources_in(source) if isinstance(part, ModelReward)]
    names = distinct([part.name for part in found])
    return {name: part.model for name, part in zip(names, found, strict=True)}


def uses_adapter(source: Any) -> bool:
    """Whether the reward adapter on the shared backbone is part of `source`."""
    return any(isinstance(part, AdapterReward) for part in sources_in(source))


def attach_adapter(source: Any, backbone: Any) -> None:
    """Puts the reward adapter of `source`, if it has one, on `backbone`.

    Raises:
        ConfigError: it does not fit the base.
    """
    for part in sources_in(source):
        if isinstance(part, AdapterReward):
            part.attach(backbone)


def _one_source(reward: Any, own_tokenizer: Any, context: RewardContext) -> Source:
    if isinstance(reward, (str, type(None))):
        if reward is None or belongs_on(reward, context.base):
            _check_no_tokenizer(own_tokenizer, "the reward adapter reads the policy's tokens")
            return AdapterReward(reward, batch_size=context.batch_size)
        return _model_source(load_reward_model(reward), own_tokenizer, context, reward)
    if isinstance(reward, nn.Module):
        return _model_source(reward, own_tokenizer, context, None)
    if callable(reward):
        _check_no_tokenizer(own_tokenizer, "functions are given text")
        return FunctionReward(
            reward,
            context.tokenizer,
            conversational=context.conversational,
            trainer_state=context.trainer_state,
        )
    raise ConfigError(
        f"reward_model must be a model, a path or a function, got {type(reward).__name__}."
    )


def _model_source(
    model: nn.Module, own_tokenizer: Any, context: RewardContext, path: str | None
) -> ModelReward:
    if own_tokenizer is not None:
        check_reward_tokenizer(own_tokenizer)
    return ModelReward(
        model,
        context.tokenizer,
        batch_size=context.batch_size,
        device=context.device,
        own_tokenizer=own_tokenizer,
        path=path,
        conversational=context.conversational,
        chat_template_kwargs=context.chat_template_kwargs,
    )


def _one_each(processing_classes: Any, rewards: list[Any]) -> list[Any]:
    if processing_classes is None:
        return [None] * len(rewards)
    several = isinstance(processing_classes, (list, tuple))
    given = list(processing_classes) if several else [processing_classes]
    if len(given) != len(rewards):
        raise ConfigError(
            f"reward_processing_classes has {len(given)} entries, but there are {len(rewards)} "
            "reward sources: give one for each, None for functions."
        )
    return given


def _check_weights(weights: Sequence[float] | None, rewards: list[Any]) -> None:
    if weights is not None and len(weights) != len(rewards):
        raise ConfigError(
            f"reward_weights has {len(weights)} entries, but there are {len(rewards)} reward "
            "sources: give one weight for each."
        )


def _check_no_tokenizer(own_tokenizer: Any, reason: str) -> None:
    if own_tokenizer is not None:
        raise ConfigError(
            f"reward_processing_classes names a tokenizer that would not be used: {reason}. Put "
            "None in its place."
        )


def _label(reward: Any, source: Source) -> str:
    """The name of a source in the log: a function's, or the last part of a model's path."""
    if isinstance(source, FunctionReward):
        return source.name
    path = reward if isinstance(reward, str) else model_name(getattr(source, "model", None))
    return path.rstrip("/").rpartition("/")[2] or source.name.replace(" ", "_")
