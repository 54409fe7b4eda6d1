"""Runs killed by SIGKILL continue bit for bit, on one and on two ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from ranks import free_port
from trl_sync.backbone.export import ADAPTER_WEIGHTS

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("resumable_run.py")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
CONFIGURATION = {
    1: ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"],
    2: ["--config_file", str(ROOT / "recipes/accelerate_configs/cpu_2.yaml")],
}
# Measured by the clock, so they differ from run to run.
CLOCK = re.compile(r"time/.*|eps|train_.*")
BATCH = 16


def launch(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    # The default port may still be held by the survivor of a run that was killed.
    options = ["--main_process_port", str(free_port()), "--dynamo_backend", "no"]
    return subprocess.run(
        [*LAUNCH, *CONFIGURATION[ranks], *options, str(SCRIPT), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def logged(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """The log without what the clock decides."""
    rows = [r for r in outcome["log_history"] if "loss" in r]
    return [{k: v for k, v in row.items() if not CLOCK.fullmatch(k)} for row in rows]


def same(left: Any, right: Any) -> bool:
    """Equality to the last bit of nested state."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.fixture(scope="module", params=[1, 2], ids=["one_rank", "two_ranks"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run to the end, and two that were killed and resumed."""
    ranks, folder = request.param, tmp_path_factory.mktemp("resume")
    base = folder / "base"
    tiny.llama().save_pretrained(base)
    for mode in ("update", "rollout"):
        killed = launch(ranks, str(base), mode, str(folder / mode))
        assert killed.returncode != 0
        assert "SIGKILL" in killed.stderr, killed.stderr
        assert list((folder / mode).glob("checkpoint-*"))
        assert not (folder / mode / "outcome_0.pt").exists()
    pairs = ["full", "full", "resume", "update", "resume", "rollout"]
    paths = [text if i % 2 == 0 else str(folder / text) for i, text in enumerate(pairs)]
    finished = launch(ranks, str(base), *paths)
    assert finished.returncode == 0, finished.stderr
    return ranks, folder


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode, checkpoint", [("update", 12), ("rollout", 20)])
def test_a_killed_run_resumes_bit_for_bit(runs: Any, mode: str, checkpoint: int) -> None:
    ranks, folder = runs
    for rank in range(ranks):
        full = torch.load(folder / "full" / f"outcome_{rank}.pt", weights_only=False)
        resumed = torch.load(folder / mode / f"outcome_{rank}.pt", weights_only=False)
        assert full["global_step"] == resumed["global_step"] == 24
        assert full["epoch"] == resumed["epoch"] == 1.5
        for name in ("parameters", "optimizer", "scheduler", "random_state"):
            assert same(full[name], resumed[name]), name
        assert logged(full) == logged(resumed)
        assert len(logged(full)) >= 8
        # What the dead process rewarded after its last checkpoint is rewarded again.
        prompts = (folder / "full" / f"prompts_{rank}.txt").read_text().splitlines()
        seen = (folder / mode / f"prompts_{rank}.txt").read_text().splitlines()
        saved = checkpoint // 4 * BATCH // ranks
        assert seen[-(len(prompts) - saved) :] == prompts[saved:]
        assert seen[:saved] == prompts[:saved]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(600)
def test_saves_inside_an_iteration_wait_for_its_end_and_hold_no_base(runs: Any) -> None:
    _, folder = runs
    steps = sorted(int(p.name.split("-")[1]) for p in (folder / "full").glob("checkpoint-*"))
    assert steps == [4, 8, 12, 16, 20, 24]
    checkpoint = folder / "full" / "checkpoint-24"
    weights = sorted(str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*.safetensors"))
    assert weights == [ADAPTER_WEIGHTS, f"value/{ADAPTER_WEIGHTS}", "value/value_head.safetensors"]
    base_bytes = sum(p.stat().st_size for p in (folder / "base").glob("*.safetensors"))
    # fp32 LoRA of rank 4 on layers 64 wide: far below the base, which would double it.
    assert sum(p.stat().st_size for p in checkpoint.rglob("*.safetensors")) < base_bytes
