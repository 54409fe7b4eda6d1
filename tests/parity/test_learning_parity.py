"""The script that compares how PPO learns here and in TRL 1.12, on a short version of its job.

docs/migration.md has the figures of the whole job. Two seeds of a third of its episodes cannot
show a difference of a quarter of a standard deviation; they show that both sides learn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import oracle

SCRIPT = Path(__file__).parents[2] / "recipes" / "bench" / "learning_parity.py"


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.timeout(600)
def test_both_sides_learn_the_embedded_task(tmp_path: Path) -> None:
    oracle.source("experimental/ppo/ppo_trainer.py")  # fails where TRL 1.12 is not installed
    file = tmp_path / "outcome.json"
    arguments = ["--seeds", "2", "--episodes", "896", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(file.read_text())
    spread = outcome["std_of_scores"]["first"]
    assert abs(outcome["first_ours"] - outcome["first_trl"]) < 0.3 * spread
    for side in ("trl", "ours"):
        assert outcome[f"last_{side}"] > outcome[f"first_{side}"] + spread
    assert outcome["last_ours"] > outcome["last_trl"] - 0.5 * spread
    assert len(outcome["runs"]) == 2
