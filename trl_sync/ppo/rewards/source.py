"""What a reward source is, and what it says about a rollout."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trl_sync.errors import RewardError
from trl_sync.ppo.batch import Rollout


@runtime_checkable  # beartype checks it in the tests
class RewardSource(Protocol):
    """Scores the responses of a rollout, one finite number each, higher is better."""

    name: str

    def __call__(self, rollout: Rollout) -> Float[Tensor, " B"]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """What reward sources say about the responses of a rollout.

    `scores` are whole episodes', 0.0 where `applies` is False (None: it applies everywhere).
    `token_rewards` is the part of the scores that stands on tokens of its own, 0.0 where the
    response has no token; the rest stands on the last token. `by_source` holds the scores of each
    of several sources before they are weighted, NaN where a source does not apply.
    """

    scores: Float[Tensor, " B"]
    token_rewards: Float[Tensor, "B R"] | None = None
    applies: Bool[Tensor, " B"] | None = None
    by_source: dict[str, Float[Tensor, " B"]] = field(default_factory=dict)

    @property
    def scores_or_nan(self) -> Float[Tensor, " B"]:
        """The scores, NaN where the source does not apply."""
        if self.applies is None:
            return self.scores
        return self.scores.masked_fill(~self.applies, math.nan)


class Source(ABC):
    """A reward source of this package: it can say more than one number an episode."""

    name: str

    def __call__(self, rollout: Rollout) -> Float[Tensor, " B"]:
        """One number an episode, NaN where this source does not apply."""
        return self.reward(rollout).scores_or_nan

    @abstractmethod
    def reward(self, rollout: Rollout, adapter_scores: Float[Tensor, " B"] | None = None) -> Reward:
        """All that this source says.

        `adapter_scores` are those of the reward adapter on a shared backbone, if a pass through
        the base has given them already.
        """


def evaluate(
    source: RewardSource, rollout: Rollout, adapter_scores: Float[Tensor, " B"] | None = None
) -> Reward:
    """What `source` says about `rollout`, checked.

    Raises:
        RewardError: names the first episode without a score, or whose score is not finite.
    """
    if not isinstance(source, Source):
        reward = Reward(scores=source(rollout))
    else:
        reward = source.reward(rollout, adapter_scores)
    if reward.applies is not None and not bool(reward.applies.all()):
        episode = int((~reward.applies).nonzero()[0])
        raise RewardError(
            f"{source.name} returned None for episode {episode}, whose prompt is "
            f"{str(rollout.prompts.prompts[episode])[:60]!r}: no reward source applies to it. At "
            "least one must give every episode a score."
        )
    check_scores(reward.scores, source.name)
    return reward


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


def sum_on_tokens(rewards: list[Tensor | None], like: Rollout) -> Float[Tensor, "B R"] | None:
    """The sum of those that are given; None if none is."""
    given = [tensor for tensor in rewards if tensor is not None]
    if not given:
        return None
    total = torch.zeros(like.response_mask.shape, device=like.response_mask.device)
    for tensor in given:
        total = total + tensor
    return total
