"""Rollout -> ScoredRollout: what policy, reference, value model and reward say about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trl_sync.backbone.roles import POLICY, REFERENCE, VALUE
from trl_sync.ppo.batch import Rollout, ScoredRollout
from trl_sync.ppo.rewards import RewardSource, check_scores


@torch.no_grad()
def score(
    model: Any,
    rollout: Rollout,
    rewards: RewardSource,
    *,
    temperature: float,
    batch_size: int,
    missing_eos_penalty: float | None = None,
) -> ScoredRollout:
    """The scored rollout; `model` is in evaluation mode.

    The log-probabilities come from the same kind of pass as in training, not from generation, so
    before the first update the ratio is 1.

    Raises:
        RewardError: a score is missing, not a number or not finite.
    """
    scores = rewards(rollout)
    check_scores(scores, rewards.name)
    if missing_eos_penalty is not None:
        scores = scores - missing_eos_penalty * (~rollout.stopped)
    rows = torch.arange(len(rollout.prompts), device=rollout.prompt_ids.device)
    parts = [
        model(
            rollout.input_ids[part],
            rollout.attention_mask[part],
            rollout.response_mask[part],
            roles=(POLICY, REFERENCE, VALUE),
            temperature=temperature,
        )
        for part in rows.split(batch_size)
    ]

    def joined(role: str, name: str) -> Tensor:
        return torch.cat([part[role][name] for part in parts])

    return ScoredRollout(
        rollout=rollout,
        logprobs=joined(POLICY, "logprobs"),
        reference_logprobs=joined(REFERENCE, "logprobs"),
        entropies=joined(POLICY, "entropies"),
        values=joined(VALUE, "values"),
        scores=scores,
    )
