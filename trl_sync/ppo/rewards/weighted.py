"""Several reward sources as one: their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trl_sync.ppo.batch import Rollout
from trl_sync.ppo.rewards.event_loop import run_together
from trl_sync.ppo.rewards.functions import FunctionReward
from trl_sync.ppo.rewards.source import Reward, Source, check_scores, sum_on_tokens


class WeightedRewards(Source):
    """The sum of `weight * score` over the sources that apply to an episode.

    `names` are distinct, one a source. Asynchronous functions run concurrently, after the others.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], names: Sequence[str]
    ) -> None:
        self.sources = tuple(sources)
        self.weights = tuple(float(weight) for weight in weights)
        self.names = tuple(names)
        self.name = " + ".join(self.names)

    def reward(self, rollout: Rollout, adapter_scores: Float[Tensor, " B"] | None = None) -> Reward:
        rewards = self._each(rollout, adapter_scores)
        scores = torch.zeros(len(rollout.prompts), device=rollout.prompt_ids.device)
        applies = torch.zeros_like(scores, dtype=torch.bool)
        on_tokens: list[Tensor | None] = []
        for name, weight, reward in zip(self.names, self.weights, rewards, strict=True):
            check_scores(reward.scores, name)
            scores = scores + weight * reward.scores
            applies |= True if reward.applies is None else reward.applies
            tokens = reward.token_rewards
            on_tokens.append(None if tokens is None else weight * tokens)
        several = len(rewards) > 1
        return Reward(
            scores=scores,
            token_rewards=sum_on_tokens(on_tokens, rollout),
            applies=applies,
            by_source={
                name: reward.scores_or_nan
                for name, reward in zip(self.names, rewards, strict=True)
                if several
            },
        )

    def _each(self, rollout: Rollout, adapter_scores: Tensor | None) -> list[Reward]:
        later = [s for s in self.sources if isinstance(s, FunctionReward) and s.is_async]
        now = {
            id(source): source.reward(rollout, adapter_scores)
            for source in self.sources
            if source not in later
        }
        if later:
            found = run_together([source.reward_async(rollout) for source in later])
            now |= {id(source): reward for source, reward in zip(later, found, strict=True)}
        return [now[id(source)] for source in self.sources]


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with `_2`, `_3`, ... behind those that came before."""
    found: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in found:
            number += 1
            candidate = f"{name}_{number}"
        found.append(candidate)
    return found
