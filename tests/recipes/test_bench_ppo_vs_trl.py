"""The benchmark beside TRL: every side runs the same small job, and the figures are those of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "recipes/bench"
SIDES = ("trl", "trl_peft", "ours_separate", "ours_shared", "ours_nf4", "ours_nf4_ckpt")
PHASES = {"rollout", "score", "update", "audit", "other"}


@pytest.fixture(scope="module")
def bench() -> Any:
    """The modules beside the script, as it imports them."""
    sys.path.insert(0, str(BENCH))
    import jobs
    import measure
    import ppo_vs_trl

    yield {"jobs": jobs, "measure": measure, "ppo_vs_trl": ppo_vs_trl}
    sys.path.remove(str(BENCH))


@pytest.mark.slow
@pytest.mark.oracle
def test_every_side_runs_the_same_job(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH / "ppo_vs_trl.py"), "--jobs", "try:natural"]
    done = subprocess.run(
        [*command, "--pairs", "1", "--json", str(output)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())
    (job,) = figures["jobs"].values()
    (runs,) = job["runs"]
    assert tuple(runs) == SIDES
    for side, run in runs.items():
        assert run["episodes"] == 4
        assert set(run["seconds"]) == PHASES, side
        assert math.isclose(sum(run["seconds"].values()), run["wall_s"], rel_tol=0.01)
        assert run["peak_bytes"] > 0
        assert 1 <= run["mean_response"] <= run["response_limit"] == 8
        # The same frozen reward model scores episodes of the same untrained policy.
        assert abs(run["first_reward"]) < 1
        audited = side.startswith("ours")
        assert (run["seconds"]["audit"] > run["audited_updates_s"] > 0) == audited
        assert (0 < job["sides"][side]["audit_share"] < 1) == audited
    state = {side: run["state_bytes"] for side, run in runs.items()}
    # Four equal models but for an LM head and one row; two of them train, with two moments each.
    full = state["ours_separate"]
    assert full["optimizer"] == pytest.approx(2 * full["gradients"], rel=0.01)
    assert state["ours_shared"]["gradients"] < full["gradients"] / 2
    assert state["ours_nf4"]["parameters"] < state["ours_shared"]["parameters"]
    for side in SIDES:
        assert f"| {side} |" in done.stdout


@pytest.mark.parametrize("job", ["15m", "15m:short", "9b:limit"])
def test_a_job_that_does_not_exist_is_refused(job: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "ppo_vs_trl.py"), "--jobs", job],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert f"--jobs {job}: use SIZE:natural or SIZE:limit" in done.stderr


def test_responses_end_at_random_and_so_late_that_half_of_the_limit_is_the_mean(
    bench: Any, tmp_path: Path
) -> None:
    job = bench["jobs"].random_job("try", tmp_path, lengths="natural", seed=1)
    model = AutoModelForCausalLM.from_pretrained(job.model)
    limit = job.settings["response_length"]
    torch.manual_seed(0)
    ids = torch.randint(2, 512, (512, 4))
    with torch.no_grad():
        end = model(ids).logits.softmax(-1)[:, -1, bench["jobs"].END]
    # Everywhere about the same: the mean of a response without a limit is the limit.
    assert float(end.mean()) == pytest.approx(1 / limit, rel=0.1)
    assert float(end.std() / end.mean()) < 0.5


def test_the_interval_and_the_exponent_are_those_of_textbooks(bench: Any) -> None:
    measure = bench["measure"]
    # Mean 2, standard deviation 1, n = 3: t(0.95, 2) = 2.920, t(0.975, 2) = 4.303.
    assert measure.lower_bound([1.0, 2.0, 3.0]) == pytest.approx(2 - 2.920 / math.sqrt(3))
    assert measure.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert measure.fitted_exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)


def test_ratios_are_medians_over_rounds(bench: Any) -> None:
    # Twice the machine slowed down between rounds; the ratio within a round is 2 or 3.
    rounds = [
        {"trl": {"speed": 1.0}, "ours_shared": {"speed": 2.0}},
        {"trl": {"speed": 0.5}, "ours_shared": {"speed": 1.0}},
        {"trl": {"speed": 0.1}, "ours_shared": {"speed": 0.3}},
    ]
    found = bench["ppo_vs_trl"].median_ratio(rounds, "ours_shared", "trl", "speed")
    assert found == pytest.approx(2.0)


def test_memory_is_counted_from_where_it_was(bench: Any) -> None:
    memory = bench["measure"].PeakMemory()
    held = torch.ones(16 * 2**20)  # 64 MiB
    peak = memory.peak_bytes()
    assert peak is not None
    assert 0.9 * held.nbytes < peak < 3 * held.nbytes


def test_the_clock_runs_for_one_phase_at_a_time(bench: Any) -> None:
    clock = bench["measure"].PhaseClock()
    for phase in ("a", "b", "a", None):
        clock.enter(phase)
    assert set(clock.seconds) == {"a", "b"}
    assert all(seconds >= 0 for seconds in clock.seconds.values())
