"""Settings of every test run: one thread, readable output, annotations checked, the CI gate."""

from __future__ import annotations

import os

# Before torch is imported, here and in the processes that tests start. The models are tiny: more
# threads are no faster, and on a machine whose cores are busy a hundred times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import jaxtyping
import pytest

# Before trl_sync is imported.
jaxtyping.install_import_hook("trl_sync", "typecheck.checked")

pytest_plugins = ["gate", "engine_table"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Recipes first, for they take minutes: of two workers neither shall wait for the other."""
    items.sort(key=lambda item: item.path.parent.name != "recipes")
