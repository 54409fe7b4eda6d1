"""Running moments of the scores, and the order of scaling, clipping and the missing stop token."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from rollouts import rollout
from trl_sync.ppo.advantage import place_rewards
from trl_sync.ppo.batch import ScoredRollout
from trl_sync.ppo.reward_scaling import RunningMoments, shape_scores


def scored(
    scores: list[float], *, stopped: list[bool] | None = None, on_tokens: Tensor | None = None
) -> ScoredRollout:
    """Episodes of three tokens each."""
    batch = rollout([[3]] * len(scores), [[4, 5, 6]] * len(scores))
    batch.stopped[:] = torch.tensor(stopped or [True] * len(scores))
    nothing = torch.zeros(len(scores), 3)
    return ScoredRollout(
        rollout=batch,
        logprobs=nothing,
        reference_logprobs=nothing,
        entropies=nothing,
        values=nothing,
        scores=torch.tensor(scores),
        token_rewards=on_tokens,
    )


def shaped(scores: ScoredRollout, moments: RunningMoments | None = None, **changes: Any) -> Any:
    return shape_scores(scores, tiny.config("unused", **changes), moments or RunningMoments())


def moments_of(*rollouts: list[float]) -> RunningMoments:
    moments = RunningMoments()
    for scores in rollouts:
        moments.update(torch.tensor(scores), lambda tensor: tensor)
    return moments


def test_running_moments_are_those_of_all_scores_so_far() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 1, 8, 5)
    parts = [torch.randn(n, generator=generator) * (n + 1) + n for n in sizes]
    moments = RunningMoments()
    for number, part in enumerate(parts):
        moments.update(part, lambda tensor: tensor)
        seen = torch.cat(parts[: number + 1]).double()
        # rel: sums of a dozen numbers in fp64.
        assert moments.mean == pytest.approx(float(seen.mean()), rel=1e-12)
        assert moments.std == pytest.approx(float(seen.std()), rel=1e-12)
        assert moments.variance == pytest.approx(float(seen.var(correction=0)), rel=1e-12)
        assert moments.count == len(seen)


def test_two_processes_have_the_moments_of_one() -> None:
    # What a sum over processes gives, in the order of the calls: here, of two with 2 scores each.
    here, there = torch.tensor([1.0, 5.0]), torch.tensor([2.0, 12.0])
    answers = iter([torch.tensor([20.0, 4.0]), torch.tensor(74.0)])
    moments = RunningMoments()
    moments.update(here, lambda tensor: next(answers).double())
    expected = moments_of([*here.tolist(), *there.tolist()])
    # (1 - 5)^2 + (5 - 5)^2 + (2 - 5)^2 + (12 - 5)^2 = 74
    assert (moments.mean, moments.std) == (5.0, math.sqrt(74 / 3))
    assert moments.state_dict() == expected.state_dict()


def test_the_state_is_plain_numbers_and_continues() -> None:
    first = moments_of([1.0, 2.0, 4.0])
    second = RunningMoments()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for moments in (first, second):
        moments.update(torch.tensor([-3.0, 0.1]), lambda tensor: tensor)
    assert first.state_dict() == second.state_dict()
    assert first.count == 5


def test_without_settings_nothing_is_changed() -> None:
    before = scored([1.0, -2.0], stopped=[True, False])
    after = shaped(before)
    assert after.scores is before.scores
    assert after.raw_scores is None


def test_scores_are_divided_by_their_running_deviation() -> None:
    moments = moments_of([0.0, 4.0], [8.0])  # mean 4, deviation 4
    found = shaped(scored([2.0, 8.0]), moments, use_score_scaling=True)
    assert found.scores.tolist() == pytest.approx([0.5, 2.0], rel=1e-6)
    assert found.raw_scores.tolist() == [2.0, 8.0]
    found = shaped(scored([2.0, 8.0]), moments, use_score_scaling=True, use_score_norm=True)
    assert found.scores.tolist() == pytest.approx([-0.5, 1.0], rel=1e-6)


def test_clipping_follows_scaling_and_the_penalty_comes_last() -> None:
    moments = moments_of([0.0, 4.0], [8.0])
    found = shaped(
        scored([2.0, 16.0, -16.0, -16.0], stopped=[True, True, True, False]),
        moments,
        use_score_scaling=True,
        score_clip=3.0,
        missing_eos_penalty=10.0,
    )
    # Divided by 4: 0.5, 4, -4, -4; clipped; the last has no stop token.
    assert found.scores.tolist() == pytest.approx([0.5, 3.0, -3.0, -13.0], rel=1e-6)


def test_clipping_alone() -> None:
    found = shaped(scored([2.0, -0.5, -9.0]), score_clip=1.5)
    assert found.scores.tolist() == [1.5, -0.5, -1.5]
    assert found.raw_scores.tolist() == [2.0, -0.5, -9.0]


def test_scores_that_never_varied_are_not_divided() -> None:
    # TRL divides them by 1e-7.
    for moments in (RunningMoments(), moments_of([3.0]), moments_of([3.0, 3.0])):
        found = shaped(scored([3.0, 3.0]), moments, use_score_scaling=True)
        assert found.scores.tolist() == pytest.approx([3.0, 3.0], rel=1e-6)


def test_rewards_on_tokens_are_scaled_and_the_rest_stands_on_the_last_token() -> None:
    moments = moments_of([0.0, 4.0], [8.0])
    on_tokens = torch.tensor([[4.0, 8.0, 0.0], [0.0, 0.0, 24.0]])
    before = scored([20.0, 24.0], stopped=[False, True], on_tokens=on_tokens)  # 8 more in row 0
    settings = {"use_score_scaling": True, "use_score_norm": True}
    found = shaped(before, moments, score_clip=5.0, missing_eos_penalty=1.0, **settings)
    # Row 0: tokens 1, 2, 0, the rest (8 - 4) / 4 = 1: 4, not clipped, minus 1.
    # Row 1: token 6, the rest (0 - 4) / 4 = -1: 5, at the clip.
    assert found.scores.tolist() == pytest.approx([3.0, 5.0], rel=1e-6)
    kl, mask = torch.zeros(2, 3), before.rollout.response_mask
    rewards = place_rewards(found.scores, kl, mask, 0.1, found.token_rewards)
    expected = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 5.0]])
    torch.testing.assert_close(rewards, expected, rtol=0.0, atol=2e-6)  # fp32, numbers below 10


def test_a_clip_on_rewards_on_tokens_stands_on_the_last_one() -> None:
    on_tokens = torch.tensor([[4.0, 8.0, 1.0]])
    found = shaped(scored([13.0], on_tokens=on_tokens), score_clip=3.0)
    mask = found.rollout.response_mask
    rewards = place_rewards(found.scores, torch.zeros(1, 3), mask, 0.1, found.token_rewards)
    assert rewards.tolist() == [[4.0, 8.0, -9.0]]
    assert found.scores.tolist() == [3.0]
