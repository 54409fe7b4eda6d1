"""The step API on two gloo ranks: one launch, many checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import ranks

SCORES = [[1.0, 5.0, 2.0, 0.0], [7.0, 3.0, 8.0, 4.0]]
NUMBERS = ("objective/kl", "objective/kl_coef", "ppo/mean_scores", "ppo/loss/policy")


def two_steps(peft: bool) -> dict[str, Any]:
    """A run on this rank's half of the episodes, and what it ends with."""
    import step_loops
    from trl_sync.errors import ConfigError, RewardError

    settings = step_loops.config(
        batch_size=4,
        mini_batch_size=2,
        gradient_accumulation_steps=2,
        ppo_epochs=2,
        use_score_scaling=True,
        max_grad_norm=1.0,
    )
    policy = step_loops.model(peft)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    trainer = step_loops.trainer(settings, policy, optimizer=optimizer, lr_scheduler=scheduler)
    rank = trainer.accelerator.process_index
    stats = []
    for number in range(2):
        queries, responses, _ = step_loops.episodes(number)
        mine = slice(4 * rank, 4 * rank + 4)
        scores = [torch.tensor(score) for score in SCORES[rank]]
        stats.append(trainer.step(queries[mine], responses[mine], scores))
    advantages = trainer.compute_advantages(
        torch.zeros(4, 1), torch.tensor(SCORES[rank])[:, None], torch.ones(4, 1).long()
    )[1]
    said = ""
    try:  # on one rank alone
        trainer.step(queries[mine], responses[mine], scores[: 4 - rank])
    except (ConfigError, RewardError) as error:
        said = f"{type(error).__name__}: {error}"
    reference = trainer.ref_model
    return {
        "parameters": {n: p.numpy() for n, p in step_loops.parameters(trainer).items()},
        "stats": [{name: row[name] for name in NUMBERS} for row in stats],
        "learning_rates": [row["ppo/learning_rate"] for row in stats],
        "moments": (trainer.running.mean, trainer.running.std, trainer.running.count),
        "kl_coef": trainer.kl_ctl.value,
        "advantages": advantages.flatten().tolist(),
        "world_size": trainer.config.world_size,
        "global_batch_size": trainer.config.global_batch_size,
        "responses": [len(r) for r in trainer.generate(queries[mine], max_new_tokens=3)],
        "said": said,
        "reference": None if reference is None else next(reference.parameters()).sum().item(),
    }


@pytest.fixture(scope="module", params=[False, True], ids=["full", "peft"])
def both(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return ranks.run_on_ranks(two_steps, request.param)


@pytest.mark.ranks
def test_ranks_end_with_the_same_parameters_and_numbers(both: list[dict[str, Any]]) -> None:
    first, second = both
    for name, parameter in first["parameters"].items():
        assert np.array_equal(parameter, second["parameters"][name]), name
    for name in ("stats", "moments", "kl_coef", "reference", "learning_rates"):
        assert first[name] == second[name], name
    assert first["world_size"] == 2
    assert first["global_batch_size"] == 8


@pytest.mark.ranks
def test_moments_scores_and_whitening_span_the_ranks(both: list[dict[str, Any]]) -> None:
    scores = np.array(SCORES).flatten()
    twice = np.concatenate([scores, scores])
    mean, std, count = both[0]["moments"]
    assert (mean, count) == (pytest.approx(twice.mean()), 16)
    assert std == pytest.approx(twice.std(ddof=1))
    # the first step divides by the deviation of the eight scores it has seen
    scaled = scores / scores.std(ddof=1)
    assert both[0]["stats"][0]["ppo/mean_scores"] == pytest.approx(scaled.mean(), rel=1e-5)
    whitened = (scores - scores.mean()) / scores.std(ddof=1)
    found = both[0]["advantages"] + both[1]["advantages"]
    np.testing.assert_allclose(found, whitened, rtol=1e-5)


@pytest.mark.ranks
def test_a_scheduler_moves_once_with_each_step(both: list[dict[str, Any]]) -> None:
    """On several processes TRL moved it once for each of them."""
    assert both[0]["learning_rates"] == [0.05, 0.025]


@pytest.mark.ranks
def test_an_error_on_one_rank_ends_both(both: list[dict[str, Any]]) -> None:
    assert both[0]["said"].startswith("RewardError: Rolling out or scoring failed on 1 other")
    assert both[1]["said"].startswith("ConfigError: scores has 3 entries")


def alone() -> str:
    """What the trainer says where accelerate's state was made without the other ranks."""
    from accelerate import PartialState

    import step_loops
    from trl_sync.errors import ConfigError

    PartialState()  # on CPUs it has to be told of them
    try:
        step_loops.trainer(step_loops.config(batch_size=4, mini_batch_size=2))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.ranks
def test_ranks_that_would_train_alone_are_refused() -> None:
    for said in ranks.run_on_ranks(alone):
        assert said.startswith("2 processes were launched, but accelerate runs 1: each would train")
