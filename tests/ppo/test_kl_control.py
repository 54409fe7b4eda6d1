from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runs
import tiny
from trl_sync.errors import ConfigError
from trl_sync.ppo.kl_control import KLControl

NO_DEADLINE = settings(deadline=None)  # the machine may be busy with other things


def control(batch_size: int = 16, **changes: Any) -> KLControl:
    options = {"kl_coef": 0.1, "kl_target": 2.0, "kl_horizon": 160.0}
    return KLControl(tiny.config("unused", **(options | changes)), batch_size)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        # 16 / 160 = a tenth of the error, which is clipped to +-0.2.
        (2.0, 0.1),  # on target
        (2.2, 0.101),  # 10% too far: +1%
        (1.8, 0.099),
        (2.4, 0.102),  # the edge of the clip
        (9.0, 0.102),
        (0.0, 0.098),
        (-3.0, 0.098),  # k1 of a sample may be negative
    ],
)
def test_one_update_by_hand(kl: float, expected: float) -> None:
    found = control()
    found.update(kl)
    assert found.coefficient == pytest.approx(expected, rel=1e-12)


def test_updates_multiply() -> None:
    found = control()
    for _ in range(3):
        found.update(100.0)
    assert found.coefficient == pytest.approx(0.1 * 1.02**3, rel=1e-12)


def test_without_a_target_the_coefficient_is_constant() -> None:
    found = control(kl_target=None, kl_horizon=10000.0, kl_coef=0.0)
    found.update(100.0)
    assert found.coefficient == 0.0
    assert not found.adaptive
    assert found.state_dict() == {}


@NO_DEADLINE
@given(st.lists(st.floats(-1e6, 1e6), max_size=20), st.floats(1e-3, 1e3), st.floats(4.0, 1e6))
def test_the_coefficient_stays_positive_and_follows_the_error(
    kls: list[float], target: float, horizon: float
) -> None:
    found = control(kl_target=target, kl_horizon=horizon)
    for kl in kls:
        before = found.coefficient
        found.update(kl)
        assert found.coefficient > 0
        assert (found.coefficient >= before) if kl >= target else (found.coefficient <= before)
        assert abs(found.coefficient / before - 1) <= 0.2 * 16 / horizon * (1 + 1e-9)


def test_the_state_survives_json() -> None:
    found, resumed = control(), control()
    found.update(100.0)
    resumed.load_state_dict(json.loads(json.dumps(found.state_dict())))
    assert resumed.coefficient == found.coefficient != 0.1
    # A run that begins to adapt with this checkpoint starts from the configured coefficient.
    anew = control()
    anew.load_state_dict(control(kl_target=None, kl_horizon=10000.0).state_dict())
    assert anew.coefficient == 0.1


def test_a_horizon_without_a_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="kl_horizon=160 has no effect without kl_target"):
        control(kl_target=None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kl_coef": 0.0}, "kl_coef=0 stays 0"),
        ({"kl_horizon": 3.2}, r"kl_horizon=3.2 is too short for a rollout batch of 16 .* than 3.2"),
    ],
)
def test_a_controller_that_cannot_work_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        control(**changes)


def test_the_coefficient_adapts_between_rollouts_and_is_logged(tmp_path: Path) -> None:
    options = {"kl_coef": 0.1, "kl_target": 0.05, "kl_horizon": 64.0}
    trainer = runs.train(tmp_path, total_episodes=64, learning_rate=1e-2, **options)
    rows = runs.rows(trainer, "objective/kl_coef")
    assert len(rows) == 4
    coefficient = 0.1
    for row in rows:
        # The rollout is punished with the coefficient from before it.
        assert row["objective/kl_coef"] == pytest.approx(coefficient, rel=1e-12)
        expected = -coefficient * row["objective/kl"]
        assert row["objective/non_score_reward"] == pytest.approx(expected, rel=1e-6)  # fp32 KL
        error = min(0.2, max(-0.2, row["objective/kl"] / 0.05 - 1))
        coefficient *= 1 + error * 16 / 64
    assert trainer.kl_control.coefficient == pytest.approx(coefficient, rel=1e-12)
    # The first rollout has KL 0, later ones are too far: down first, then up.
    found = [row["objective/kl_coef"] for row in rows]
    assert found[1] == pytest.approx(0.1 * 0.95)
    assert found[-1] > found[-2]


def test_without_a_target_no_coefficient_is_logged(tmp_path: Path) -> None:
    trainer = runs.train(tmp_path, total_episodes=16)
    assert not runs.rows(trainer, "objective/kl_coef")


def test_a_resumed_run_continues_with_its_coefficient(tmp_path: Path) -> None:
    options = {"kl_target": 0.05, "kl_horizon": 64.0, "save_strategy": "steps", "save_steps": 4}
    whole = runs.train(tmp_path, **options)
    resumed = runs.make(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    assert resumed.kl_control.coefficient == whole.kl_control.coefficient
    assert runs.same(runs.trained(resumed), runs.trained(whole))
    last = [runs.rows(trainer, "objective/kl_coef")[-1] for trainer in (whole, resumed)]
    assert last[0]["objective/kl_coef"] == last[1]["objective/kl_coef"] != 0.05
