"""The workflow files call what the Makefile has, and a release waits for all checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def commands(workflow: dict[str, Any]) -> str:
    steps = [step for job in workflow["jobs"].values() for step in job.get("steps", [])]
    return "\n".join(step.get("run", "") for step in steps)


def targets_of(matrix: dict[str, Any]) -> set[str]:
    """The targets of a job's matrix, also those that are added one by one."""
    return {*matrix.get("target", ()), *(row.get("target") for row in matrix.get("include", ()))}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_target_exists(path: Path) -> None:
    called = re.findall(r"\bmake (?:-\S+ )*([a-z-]+)", commands(read(path)))
    assert set(called) <= TARGETS


def test_ci_runs_all_checks() -> None:
    workflow = read(ROOT / ".github" / "workflows" / "ci.yml")
    matrices = [job.get("strategy", {}).get("matrix", {}) for job in workflow["jobs"].values()]
    listed = {target for matrix in matrices for target in targets_of(matrix)}
    script = (ROOT / ".ci" / "run").read_text()
    for target in ("lint", "test", "engines-short", "test-floor"):
        assert f"make {target}" in script
        assert f"make {target}" in commands(workflow) or target in listed


def test_a_release_needs_ci_and_may_write_nothing_but_the_package() -> None:
    workflow = read(ROOT / ".github" / "workflows" / "release.yml")
    jobs = workflow["jobs"]
    assert jobs["publish"]["needs"] == "ci"
    assert jobs["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert workflow["permissions"] == {"contents": "read"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
