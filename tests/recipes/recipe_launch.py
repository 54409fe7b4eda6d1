"""Recipes as users start them: `accelerate launch` with a config, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ranks import free_port

ROOT = Path(__file__).parents[2]


def launch(
    recipe: str, *arguments: str, ranks: int = 1, cwd: Path = ROOT, timeout_s: float = 280
) -> subprocess.CompletedProcess[str]:
    """`recipes/<recipe>` on that many CPU ranks, one thread each; what it printed, and its end."""
    config = ROOT / f"recipes/accelerate_configs/cpu_{ranks}.yaml"
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    port = ["--main_process_port", str(free_port())]
    return subprocess.run(
        [*start, *port, str(ROOT / "recipes" / recipe), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
