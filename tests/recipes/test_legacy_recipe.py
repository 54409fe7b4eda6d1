"""The step API on the embedded task: a loop of the user's own, whose reward rises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from embedded_default import embedded_default
from ranks import free_port
from trl_sync.legacy import AutoModelForCausalLMWithValueHead

RECIPE = Path(__file__).parents[2] / "recipes" / "ppo_legacy_step.py"
CONFIGS = RECIPE.parent / "accelerate_configs"


def launch(ranks: int, folder: Path, *flags: str) -> str:
    """What the recipe printed, started in `folder`."""
    start = [sys.executable, "-m", "accelerate.commands.launch"]
    start += ["--config_file", str(CONFIGS / f"cpu_{ranks}.yaml")]
    done = subprocess.run(
        [*start, "--main_process_port", str(free_port()), str(RECIPE), *flags],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_reward_rises(tmp_path: Path) -> None:
    printed = launch(1, tmp_path, "--steps", "1280")
    scores = [float(text) for text in re.findall(r"^step \d+: score (\S+),", printed, re.M)]
    assert len(scores) == 10
    # The scores of single answers have a standard deviation of 1; a batch has 128.
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.5
    saved = AutoModelForCausalLMWithValueHead.from_pretrained(
        str(tmp_path / "runs/ppo-legacy-step")
    )
    fresh = AutoModelForCausalLMWithValueHead.from_pretrained(str(embedded_default().model_path))
    assert not torch.equal(saved.v_head.summary.weight, fresh.v_head.summary.weight)
    moved = dict(fresh.pretrained_model.named_parameters())
    assert all(
        not parameter.equal(moved[name])
        for name, parameter in saved.pretrained_model.named_parameters()
    )


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_keep_one_model(tmp_path: Path) -> None:
    printed = launch(2, tmp_path, "--steps", "256")
    # Two batches of 128 on each rank; rank 0 speaks for both.
    assert re.findall(r"^step (\d+): score", printed, re.M) == ["1", "2"]
    assert printed.count("model and value head in") == 1
    AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "runs/ppo-legacy-step"))
