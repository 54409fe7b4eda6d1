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
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
]


@pytest.mark.slow
def test_the_reward_rises(tmp_path: Path) -> None:
    done = subprocess.run(
        [*LAUNCH, "--main_process_port", str(free_port()), str(RECIPE), "--steps", "1280"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    scores = [float(text) for text in re.findall(r"^step \d+: score (\S+),", done.stdout, re.M)]
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
