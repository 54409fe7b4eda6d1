"""Rollout -> ScoredRollout: what policy, reference, value model and reward say about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trl_sync.backbone.roles import POLICY, REFERENCE, REWARD, VALUE
from trl_sync.ppo.batch import Rollout, ScoredRollout
from trl_sync.ppo.rewards import RewardSource, evaluate, uses_adapter


@torch.no_grad()
def score(
    model: Any,
    rollout: Rollout,
    rewards: RewardSource,
    *,
    temperature: float,
    batch_size: int,
) -> ScoredRollout:
    """The rollout with the scores as `rewards` gives them; `model` is in evaluation mode.

    The log-probabilities come from the same kind of pass as in training, not from generation, so
    before the first update the ratio is 1. A reward adapter on the shared base takes part in it.

    Raises:
        RewardError: a score is missing, not a number or not finite.
    """
    roles = (POLICY, REFERENCE, VALUE) + ((REWARD,) if uses_adapter(rewards) else ())
    rows = torch.arange(len(rollout.prompts), device=rollout.prompt_ids.device)
    parts = [
        model(
            rollout.input_ids[part],
            rollout.attention_mask[part],
            rollout.response_mask[part],
            roles=roles,
            temperature=temperature,
        )
        for part in rows.split(batch_size)
    ]

    def joined(role: str, name: str) -> Tensor:
        return torch.cat([part[role][name] for part in parts])

    adapter_scores = joined(REWARD, "scores") if REWARD in roles else None
    reward = evaluate(rewards, rollout, adapter_scores)
    return ScoredRollout(
        rollout=rollout,
        logprobs=joined(POLICY, "logprobs"),
        reference_logprobs=joined(REFERENCE, "logprobs"),
        entropies=joined(POLICY, "entropies"),
        values=joined(VALUE, "values"),
        scores=reward.scores,
        token_rewards=reward.token_rewards,
        source_scores=reward.by_source,
    )
