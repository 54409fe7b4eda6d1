"""In CI a run fails when a required test did not run: pytest itself on small folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = """
[pytest]
testpaths = suite
markers =
    ranks
    oracle
    gpu
    engines
"""
PASSES = "import pytest\n@pytest.mark.ranks\n@pytest.mark.oracle\ndef test_passes(): pass\n"
SKIPS = "def test_skips(): pytest.skip('the moon is full')\n"
SKIPS_AT_IMPORT = "import pytest\npytest.skip('no such library', allow_module_level=True)\n"
NEEDS_GPU = "@pytest.mark.gpu\ndef test_gpu(): pytest.skip('no GPU')\n"
NO_ORACLE = "def test_runs(): pass\n"
TWO_WORKERS = ["-n", "2", "--dist", "loadfile", "-m", "not engines"]
NO_RANKS = "import pytest\n@pytest.mark.oracle\ndef test_passes(): pass\n"
ONLY_RANKS = "import pytest\n@pytest.mark.ranks\ndef test_passes(): pass\n"


def run(folder: Path, files: dict[str, str], *arguments: str, ci: str = "1") -> tuple[int, str]:
    (folder / "suite").mkdir()
    (folder / "pytest.ini").write_text(SETTINGS)
    for name, text in files.items():
        (folder / "suite" / name).write_text(text)
    environment = os.environ | {"CI": ci, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "pytest", "-p", "gate", "-p", "no:cacheprovider", *arguments]
    finished = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    return finished.returncode, finished.stdout


@pytest.mark.parametrize(
    "files, arguments, complaint",
    [
        ({"test_a.py": PASSES}, [], None),
        ({"test_a.py": PASSES + NEEDS_GPU}, [], None),
        ({"test_a.py": PASSES + SKIPS}, [], "test_skips: Skipped: the moon is full"),
        ({"test_a.py": PASSES + SKIPS}, ["suite/test_a.py"], "the moon is full"),
        ({"test_a.py": PASSES, "test_b.py": SKIPS_AT_IMPORT}, [], "test_b.py: Skipped: no such"),
        ({"test_a.py": NO_RANKS}, [], "no test marked 'ranks' ran"),
        ({"test_a.py": NO_RANKS}, ["suite/test_a.py"], None),
        ({"test_a.py": NO_RANKS}, ["-k", "passes"], None),
        ({"test_a.py": NO_RANKS}, ["-m", "not engines"], "no test marked 'ranks' ran"),
        ({"test_a.py": NO_RANKS}, ["-m", "not ranks"], None),
        ({"test_a.py": NO_RANKS}, ["-m", "not engines and not ranks"], None),
        ({"test_a.py": NO_ORACLE}, ["-m", "not engines"], "no test marked 'oracle'"),
        # Of two workers neither runs everything.
        ({"test_a.py": NO_RANKS, "test_b.py": ONLY_RANKS}, TWO_WORKERS, None),
        ({"test_a.py": NO_RANKS}, TWO_WORKERS, "no test marked 'ranks' ran"),
        ({"test_a.py": ONLY_RANKS}, TWO_WORKERS, "no test marked 'oracle' ran"),
        ({"test_a.py": PASSES + SKIPS}, TWO_WORKERS, "test_skips: Skipped: the moon is full"),
        ({"test_a.py": PASSES, "test_b.py": SKIPS_AT_IMPORT}, TWO_WORKERS, "no such library"),
    ],
)
def test_the_gate(
    tmp_path: Path, files: dict[str, str], arguments: list[str], complaint: str | None
) -> None:
    code, output = run(tmp_path, files, *arguments)
    assert code == (0 if complaint is None else 1), output
    assert complaint is None or complaint in output
    assert ("required tests that did not run" in output) == (complaint is not None)


def test_outside_ci_nothing_is_required(tmp_path: Path) -> None:
    code, output = run(tmp_path, {"test_a.py": NO_RANKS + SKIPS}, ci="")
    assert code == 0, output
