"""Reward sources: a sequence classifier, or a Python function."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl_sync.backbone.loading import load_reward_model
from trl_sync.backbone.quantization import keep_packed_weights
from trl_sync.backbone.roles import freeze
from trl_sync.errors import ConfigError, RewardError
from trl_sync.ppo.batch import Rollout
from trl_sync.ppo.prompts import check_tokenizer

# Tokens that a tokenizer may have beyond the reward model's before they are another vocabulary.
_ADDED_TOKENS = 16

RewardFunction = Callable[..., list[float]]

_OWN_KEYWORDS = ("prompts", "completions")


@runtime_checkable  # beartype checks it in the tests
class RewardSource(Protocol):
    """Scores the responses of a rollout, one finite number each, higher is better."""

    name: str

    def __call__(self, rollout: Rollout) -> Float[Tensor, " B"]: ...


def reward_source(
    reward: nn.Module | RewardFunction | str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    conversational: bool,
    batch_size: int,
    device: torch.device,
) -> RewardSource:
    """A reward source from what the user gave: a model, its path or hub name, or a function.

    Raises:
        ConfigError: nothing was given, or a model that cannot score single sequences.
    """
    if reward is None:
        raise ConfigError(
            "No reward source: pass reward_model, a sequence classifier or a function "
            "(prompts, completions, **columns) -> list of floats."
        )
    if isinstance(reward, str):
        reward = load_reward_model(reward)
    if isinstance(reward, nn.Module):
        return ModelReward(reward, tokenizer, batch_size=batch_size, device=device)
    if callable(reward):
        return FunctionReward(reward, tokenizer, conversational=conversational)
    raise ConfigError(
        f"reward_model must be a model, a path or a function, got {type(reward).__name__}."
    )


class ModelReward:
    """A frozen sequence classifier with one label and the policy's tokenizer.

    Raises:
        ConfigError: the model has several labels, no `score` head, or too few embeddings.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.model = model
        self.name = "reward model"
        inner = model.base_model.model if isinstance(model, PeftModel) else model
        self._inner = cast(Any, inner)
        self._batch_size = batch_size
        if not hasattr(self._inner, "score"):
            raise ConfigError(
                f"The reward model {type(self._inner).__name__} has no `score` head: use an "
                "AutoModelForSequenceClassification of a decoder model, or pass a function."
            )
        labels = getattr(self._inner.config, "num_labels", 1)
        if labels != 1:
            raise ConfigError(
                f"The reward model has {labels} labels, but PPO needs one number per episode: load "
                "it with num_labels=1, or pass a function that combines the labels."
            )
        check_tokenizer(
            tokenizer, self._inner.get_input_embeddings().weight.shape[0], "reward model"
        )
        _check_vocabulary(Path(getattr(self._inner.config, "_name_or_path", "")), tokenizer)
        freeze(model)
        keep_packed_weights(model)
        if not getattr(self._inner, "is_quantized", False):
            model.to(device)

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Float[Tensor, " B"]:
        rows = torch.arange(len(rollout.prompts), device=rollout.prompt_ids.device)
        return torch.cat([self._score(rollout, part) for part in rows.split(self._batch_size)])

    def _score(self, rollout: Rollout, rows: Tensor) -> Float[Tensor, " B"]:
        mask = rollout.attention_mask[rows]
        trunk = getattr(self._inner, self._inner.base_model_prefix)
        hidden = trunk(
            input_ids=rollout.input_ids[rows].masked_fill(~mask, 0),
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        # The classifier's own pooling looks for the padding id, which may be the stop token's.
        last = rollout.prompt_ids.shape[1] + rollout.response_mask[rows].sum(1) - 1
        picked = hidden[torch.arange(len(rows), device=hidden.device), last]
        return self._inner.score(picked).squeeze(-1).float()


def _check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Nothing, if the reward model's own tokenizer, where it lies beside it, has the same ids.

    A few tokens may be missing there, such as a padding token added later.

    Raises:
        ConfigError: the vocabularies differ.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return
    own = AutoTokenizer.from_pretrained(str(folder)).get_vocab()
    ids = tokenizer.get_vocab()
    moved = [token for token, i in ids.items() if own.get(token, i) != i]
    missing = [token for token in ids if token not in own]
    if moved or len(missing) > _ADDED_TOKENS:
        example = min(moved or missing, key=lambda token: ids[token])
        raise ConfigError(
            f"The reward model in {folder} has another vocabulary: {example!r} is token "
            f"{ids[example]} of the policy's tokenizer and {own.get(example)} of its own. It would "
            "score other text. Use a reward model of the same tokenizer, or a function that "
            "tokenizes the text anew."
        )


class FunctionReward:
    """A function of prompts, completions and the dataset's other columns.

    It is called with keywords: `prompts` and `completions` (lists of text, or of messages for a
    conversational dataset) and each further column it accepts; all of them if it takes `**kwargs`
    or has no signature to read. Columns called `prompts` or `completions` are not passed. It
    returns one number per episode: a list, a tensor or an array.
    """

    def __init__(
        self,
        function: RewardFunction,
        tokenizer: PreTrainedTokenizerBase,
        *,
        conversational: bool,
    ) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        self._function = function
        self._tokenizer = tokenizer
        self._conversational = conversational
        self._accepted = _keywords(function)

    def __call__(self, rollout: Rollout) -> Float[Tensor, " B"]:
        texts = completion_texts(rollout, self._tokenizer)
        completions: list[Any] = list(texts)
        if self._conversational:
            completions = [[{"role": "assistant", "content": text}] for text in texts]
        columns = {
            name: values
            for name, values in rollout.prompts.columns.items()
            if (self._accepted is None or name in self._accepted) and name not in _OWN_KEYWORDS
        }
        scores = self._function(prompts=rollout.prompts.prompts, completions=completions, **columns)
        return _checked(scores, len(texts), self.name).to(rollout.prompt_ids.device)


def completion_texts(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The responses as text, without special tokens."""
    rows = zip(rollout.response_ids, rollout.response_mask, strict=True)
    texts: list[str] = tokenizer.batch_decode(
        [ids[mask].tolist() for ids, mask in rows], skip_special_tokens=True
    )
    return texts


def _keywords(function: RewardFunction) -> set[str] | None:
    """The keywords that `function` accepts, or None if that is any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # written in C, without a signature
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def _checked(scores: Any, expected: int, name: str) -> Tensor:
    if not isinstance(scores, Iterable) or getattr(scores, "ndim", 1) == 0:
        raise RewardError(
            f"{name} returned {scores!r}: expected a list of {expected} numbers, one a completion."
        )
    # Elements of tensors and arrays become Python's own numbers.
    values = [v.item() if getattr(v, "ndim", None) == 0 else v for v in scores]
    if len(values) != expected:
        raise RewardError(f"{name} returned {len(values)} scores for {expected} completions.")
    for position, value in enumerate(values):
        if not isinstance(value, (int, float)):
            raise RewardError(
                f"{name} returned {value!r} for completion {position}: expected a number."
            )
    return torch.tensor(values, dtype=torch.float32)


def check_scores(scores: Float[Tensor, " B"], name: str) -> None:
    """Nothing, if every score is finite.

    Raises:
        RewardError: names the first episode whose score is not.
    """
    for position, value in enumerate(scores.tolist()):
        if not math.isfinite(value):
            raise RewardError(
                f"{name} gave episode {position} the score {value}: scores must be finite. "
                "Training stops before this rollout changes any weight."
            )
