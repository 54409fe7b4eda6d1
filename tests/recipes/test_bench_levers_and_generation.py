"""`recipes/bench/levers.py` and `generation.py` as users start them, on the smallest model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str, into: Path) -> dict[str, Any]:
    path = ROOT / "recipes/bench" / script
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(path), *arguments, "--json", str(into)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures: dict[str, Any] = json.loads(into.read_text())
    assert {"machine", "date", "command"} <= set(figures)
    return figures


@pytest.mark.slow
def test_every_lever_is_turned_off_and_on(tmp_path: Path) -> None:
    figures = run(
        "levers.py", "--job", "try:natural", "--rounds", "1", "--profile", into=tmp_path / "l.json"
    )
    assert len(figures["levers"]) == 6
    for lever, found in figures["levers"].items():
        assert len(found["rounds"]) == 1, lever
        assert all(found[phase]["ratio"] > 0 for phase in ("rollout", "score", "update", "all"))
        assert set(found["profile_ms"]) == {"with", "without"}


@pytest.mark.slow
def test_both_caches_generate(tmp_path: Path) -> None:
    figures = run(
        "generation.py", "--shape", "try", "--rows", "2", "--rounds", "1", into=tmp_path / "g.json"
    )
    for base in ("plain", "nf4"):
        found = figures["bases"][base]
        assert found["static_over_dynamic"] > 0
        assert found["dynamic"]["tokens_per_s"] > 0
