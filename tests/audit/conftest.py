"""Checkpoints of real Trainer runs, with their manifests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import manifests
import tiny


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Trainer that saved a whole model in shards."""
    return manifests.train(tmp_path_factory.mktemp("full"), tiny.llama())


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Trainer that saved a LoRA adapter; its base lies in `base` beside the checkpoints."""
    folder = tmp_path_factory.mktemp("lora")
    tiny.llama().save_pretrained(folder / "base", max_shard_size="100KB")
    return manifests.train(folder, manifests.lora_model())


@pytest.fixture(scope="session")
def other_lora_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return manifests.train(tmp_path_factory.mktemp("other"), manifests.lora_model(5), seed=5)


def copied(run: Any, tmp_path: Path) -> Path:
    """The last checkpoint of `run`, in a folder that the test may damage."""
    source = Path(run.args.output_dir) / "checkpoint-2"
    return Path(shutil.copytree(source, tmp_path / source.parent.name))


@pytest.fixture
def full(full_run: Any, tmp_path: Path) -> Path:
    return copied(full_run, tmp_path)


@pytest.fixture
def lora(lora_run: Any, tmp_path: Path) -> Path:
    return copied(lora_run, tmp_path)
