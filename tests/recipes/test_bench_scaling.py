"""`recipes/bench/scaling.py` as users start it, on sizes as small as it takes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "bench" / "scaling.py"
FIGURES = {
    "vocabulary": {"update_s", "update_bytes", "update_bytes_ratio", "bytes", "bytes_ratio"},
    "sequence": {"us_per_token", "attention_us_per_token", "other_us_per_token"},
    "batch": {"update_s", "us_per_token", "iteration_s"},
}


@pytest.mark.slow
def test_every_part_gives_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    sizes = {"vocabularies": (64, 4096), "response-tokens": (8, 32), "episodes": (8, 16)}
    arguments = ["--quick", "--repeats", "1", "--json", str(path)]
    for name, values in sizes.items():
        arguments += [f"--{name}", *map(str, values)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(path.read_text())
    assert {"machine", "threads", "device", "torch", "date", "command"} <= set(figures)
    assert set(figures["parts"]) == set(FIGURES)
    for (part, names), expected in zip(FIGURES.items(), sizes.values(), strict=True):
        result = figures["parts"][part]
        assert [row["size"] for row in result["points"]] == list(expected)
        for row in result["points"]:
            assert names <= set(row)
            assert all(math.isfinite(row[name]) and row[name] > 0 for name in names)
            assert len(row["turns"]) == 1  # the round to warm up does not count
        assert result["exponents"]
    small, large = figures["parts"]["vocabulary"]["points"]
    # Two matrices of 192 columns in fp32.
    assert small["embedding_and_head_bytes"] == 2 * 64 * 192 * 4
    assert large["embedding_and_head_bytes"] == 2 * 4096 * 192 * 4
    # All 8 x 64 response tokens in one chunk of fp32 logits.
    assert large["update_bytes"] - small["update_bytes"] > 8 * 64 * (4096 - 64) * 4
    rows = [point["rows"] for point in figures["parts"]["sequence"]["points"]]
    assert rows == [4, 1]
    for title in ("### Vocabulary", "### Sequence", "### Batch", "Exponents"):
        assert title in done.stdout
