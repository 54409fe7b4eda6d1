"""What pyproject.toml promises is what the two ends of the supported range are tested with."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import trl_sync.backbone.checkpointing as checkpointing
from tiny import llama, reward_llama
from trl_sync.errors import ConfigError

REPOSITORY = Path(__file__).parents[1]
# What `make test-floor` has older than `make test`.
OLDER = ("trl", "transformers")


def pins(name: str) -> dict[str, Version]:
    """The exact versions of a constraints file, by package."""
    lines = (REPOSITORY / name).read_text().splitlines()
    parts = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {package.lower(): Version(version) for package, version in parts}


def floors() -> dict[str, Version]:
    """The lowest versions that pyproject.toml allows, of all that a user may install."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    found = {}
    for line in project["dependencies"] + project["optional-dependencies"]["report"]:
        requirement = Requirement(line)
        [lowest] = [
            Version(part.version) for part in requirement.specifier if part.operator == ">="
        ]
        found[requirement.name.lower()] = lowest
    return found


def test_the_lowest_versions_are_those_of_the_floor() -> None:
    oldest = pins("constraints-floor.txt")
    for package in OLDER:
        assert floors()[package] == oldest[package], package


def test_the_other_lowest_versions_are_the_tested_ones() -> None:
    tested = pins("constraints.txt")
    for package, lowest in floors().items():
        if package not in OLDER:
            # A floor may leave out the last part of a version, not more.
            assert tested[package].release[: len(lowest.release)] == lowest.release, package


def test_every_pinned_version_is_allowed() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        requirement = Requirement(line)
        for file in ("constraints.txt", "constraints-floor.txt"):
            pinned = pins(file).get(requirement.name.lower())
            assert pinned is None or pinned in requirement.specifier, (file, line)


def test_this_run_has_the_versions_of_one_end() -> None:
    found = {package: Version(importlib.metadata.version(package)) for package in OLDER}
    ends = [pins("constraints.txt"), pins("constraints-floor.txt")]
    assert found in [{package: end[package] for package in OLDER} for end in ends]


def test_checkpointing_under_the_name_that_this_version_has() -> None:
    for model in (llama(), reward_llama()):
        assert not checkpointing.is_checkpointing(model)
        checkpointing.enable_checkpointing(model, {"use_reentrant": False})
        assert checkpointing.is_checkpointing(model)
        checkpointing.disable_checkpointing(model)
        assert not checkpointing.is_checkpointing(model)


def test_a_model_that_cannot_checkpoint_is_named() -> None:
    plain = llama().lm_head
    assert not checkpointing.is_checkpointing(plain)
    for switch in (checkpointing.enable_checkpointing, checkpointing.disable_checkpointing):
        with pytest.raises(ConfigError, match="Linear cannot recompute"):
            switch(plain)
