"""A rank is killed in the middle of an update: the others end, and the run continues."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import engines
import killed_run
import tiny
from ranks import free_port, launcher_environment
from trl_sync.audit.manifest import read_manifest
from trl_sync.audit.manifest_files import check_files

pytestmark = [pytest.mark.engines, pytest.mark.ranks]

SCRIPT = Path(killed_run.__file__)
SLOW = pytest.mark.slow
ENGINES = [
    pytest.param("ddp", marks=SLOW),
    pytest.param("zero1", marks=SLOW),
    "zero2",
    pytest.param("zero3", marks=SLOW),
    "fsdp2",
    pytest.param("hsdp", marks=SLOW),
]


def launch(engine: str, folder: Path, mode: str, deadline_s: float) -> tuple[list[int], str]:
    """The exit code of each rank, and what they wrote; the ranks start without a launcher."""
    ranks, port = engines.RANKS.get(engine, 2), free_port()
    log = folder / f"{mode}.log"
    with log.open("w") as output:
        processes = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), engine, str(folder), mode],
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
                | launcher_environment(rank, ranks, port, engines.ENVIRONMENTS[engine]),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for rank in range(ranks)
        ]
        deadline = time.monotonic() + deadline_s
        try:
            codes = [p.wait(max(0.1, deadline - time.monotonic())) for p in processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"{mode}: still running after {deadline_s} s\n{log.read_text()[-3000:]}")
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return codes, log.read_text()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.timeout(500)
def test_a_killed_rank_ends_all_and_the_run_continues(tmp_path: Path, engine: str) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    codes, said = launch(engine, tmp_path, "kill", deadline_s=150)
    assert codes[1] == -9, said[-3000:]
    # SIGKILL from nobody: each of the others ended by itself, with an error.
    assert all(code not in (0, -9) for rank, code in enumerate(codes) if rank != 1), codes
    assert "rank_missing" in said
    output = tmp_path / "killed" / "out"
    checkpoints = [path.name for path in output.glob("checkpoint-*")]
    assert checkpoints == ["checkpoint-4"]
    assert not check_files(output / "checkpoint-4", read_manifest(output / "checkpoint-4"))
    codes, said = launch(engine, tmp_path, "resume", deadline_s=250)
    assert codes == [0] * len(codes), said[-3000:]
    for rank in range(len(codes)):
        line = (tmp_path / f"resumed_{rank}.txt").read_text()
        assert line.startswith("started at 4, equal True")
