"""Rollout -> ScoredRollout: what policy, reference, value model and reward say about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trl_sync.backbone.roles import POLICY, REFERENCE, REWARD, VALUE
from trl_sync.ppo.batch import Rollout, ScoredRollout
from trl_sync.ppo.padding import Lengths, RightAligned
from trl_sync.ppo.rewards import RewardSource, evaluate, uses_adapter


@torch.no_grad()
def score(
    model: Any,
    rollout: Rollout,
    rewards: RewardSource,
    *,
    temperature: float,
    batch_size: int,
    with_reference: bool = True,
) -> ScoredRollout:
    """The rollout with the scores as `rewards` gives them; `model` is in evaluation mode.

    The log-probabilities come from the same kind of pass as in training, not from generation, so
    before the first update the ratio is 1. A reward adapter on the shared base takes part in it.
    A pass has at most `batch_size` rows, those of all roles that share it together.

    Raises:
        RewardError: a score is missing, not a number or not finite.
    """
    asked = {POLICY: True, REFERENCE: with_reference, VALUE: True, REWARD: uses_adapter(rewards)}
    roles = tuple(role for role, wanted in asked.items() if wanted)
    said = _ask(model, rollout, roles, temperature, batch_size)
    reward = evaluate(rewards, rollout, said.get((REWARD, "scores")))
    return ScoredRollout(
        rollout=rollout,
        logprobs=said[POLICY, "logprobs"],
        reference_logprobs=said.get((REFERENCE, "logprobs")),
        entropies=said[POLICY, "entropies"],
        values=said[VALUE, "values"],
        scores=reward.scores,
        token_rewards=reward.token_rewards,
        source_scores=reward.by_source,
    )


def _ask(
    model: Any, rollout: Rollout, roles: tuple[str, ...], temperature: float, batch_size: int
) -> dict[tuple[str, str], Tensor]:
    """What each role says of each row, by role and name; similar lengths share a pass."""
    lengths = Lengths.of(rollout.prompt_mask, rollout.response_mask)
    size = max(1, batch_size // len(roles)) if model.stacks_roles else batch_size
    said: dict[tuple[str, str], Tensor] = {}
    mask = rollout.response_mask
    for rows in lengths.parts(size):
        aligned = RightAligned(
            rows, lengths, prompt_width=rollout.prompt_ids.shape[1], device=mask.device
        )
        outputs = model(
            aligned.sequences(rollout.input_ids),
            aligned.sequences(rollout.attention_mask),
            aligned.responses(mask),
            roles=roles,
            temperature=temperature,
            response_positions=aligned.response_positions,
        )
        for role in roles:
            for name, part in outputs[role].items():
                if (role, name) not in said:
                    said[role, name] = part.new_zeros(mask.shape[: part.ndim])
                if part.ndim == 1:
                    said[role, name][rows.to(part.device)] = part
                else:
                    aligned.write_back(part, said[role, name])
    return said
