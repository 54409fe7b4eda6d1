"""Scores between the reward source and the rewards: scaled, clipped, penalized.

The running moments are those of TRL's step API (up to 0.11), over the scores of all processes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trl_sync.ppo.advantage import ReduceSum
from trl_sync.ppo.batch import ScoredRollout
from trl_sync.ppo.config import PPOConfig

# Added to the standard deviation, as TRL does.
_EPSILON = torch.finfo(torch.float32).eps


class RunningMoments:
    """Mean and variance of all scores of a run so far, the same on every process.

    Chan's parallel update of a mean and a sum of squares. `std` is the unbiased one; it is 1 until
    there are two scores.
    """

    def __init__(self) -> None:
        self.mean = 0.0
        self.variance = 1.0
        self.std = 1.0
        self.count = 0.0

    def update(self, scores: Float[Tensor, " B"], reduce_sum: ReduceSum) -> tuple[float, float]:
        """Takes in the scores of one rollout of all processes; returns their mean and deviation.

        A collective. Source: Chan et al., "Updating Formulae and a Pairwise Algorithm for Computing
        Sample Variances" (1979).
        """
        values = scores.double()
        count_here = values.new_tensor(len(values))
        total, count = reduce_sum(torch.stack([values.sum(), count_here])).tolist()
        mean = total / count
        squares = float(reduce_sum((values - mean).pow(2).sum()))
        deviation = math.sqrt(squares / max(count - 1, 1))
        before, self.count = self.count, self.count + count
        delta = mean - self.mean
        squares += self.variance * before + delta**2 * before * count / self.count
        self.mean += delta * count / self.count
        self.variance = squares / self.count
        if self.count > 1:
            self.std = math.sqrt(squares / (self.count - 1))
        return mean, deviation

    def state_dict(self) -> dict[str, float]:
        """The numbers that a checkpoint keeps."""
        return {n: getattr(self, n) for n in ("mean", "variance", "std", "count")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was called; from nothing it begins anew."""
        for name in state and self.state_dict():
            setattr(self, name, float(state[name]))


def shape_scores(
    scored: ScoredRollout, config: PPOConfig, moments: RunningMoments
) -> ScoredRollout:
    """The rollout with the scores that training sees.

    In this order: `use_score_scaling` divides by the running standard deviation, with
    `use_score_norm` after subtracting the running mean; `score_clip` clips; and
    `missing_eos_penalty` is taken off where the response has no stop token. Rewards on tokens are
    scaled too; what else is added to an episode's score stands on its last token. Scores that have
    never varied are not divided.
    """
    scores, on_tokens = scored.scores, scored.token_rewards
    changed = config.use_score_scaling or config.score_clip is not None
    if config.use_score_scaling:
        factor = moments.std + _EPSILON if moments.std > 0 else 1.0
        shift = moments.mean if config.use_score_norm else 0.0
        on_last = scores if on_tokens is None else scores - on_tokens.sum(1)
        scores = (on_last - shift) / factor
        if on_tokens is not None:
            on_tokens = on_tokens / factor
            scores = scores + on_tokens.sum(1)
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    if config.missing_eos_penalty is not None:
        scores = scores - config.missing_eos_penalty * (~scored.rollout.stopped)
    return dataclasses.replace(
        scored,
        scores=scores,
        token_rewards=on_tokens,
        raw_scores=scored.scores if changed else scored.raw_scores,
    )
