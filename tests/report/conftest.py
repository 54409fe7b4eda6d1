"""`make_run`, which writes a run folder by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run_folders import write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A folder of that name below `tmp_path`, with the changes of `write_run`."""

    def make(name: str = "run", **changes: Any) -> Path:
        return write_run(tmp_path / name, **changes)

    return make
