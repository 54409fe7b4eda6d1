"""The recipes as files: short, and each on the page that lists them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 150
PAGE = (ROOT / "docs" / "recipes.md").read_text()
LISTED = sorted(set(re.findall(r"\]\(\.\./recipes/([a-z_]+\.py)\)", PAGE)))
# What several recipes share.
SHARED = {"inputs.py", "lessons.py", "ppo_run.py"}


def test_every_recipe_is_on_the_page() -> None:
    files = {path.name for path in (ROOT / "recipes").glob("*.py")}
    assert files - SHARED == set(LISTED) - SHARED


@pytest.mark.parametrize("name", [name for name in LISTED if name not in SHARED])
def test_a_recipe_is_short(name: str) -> None:
    assert len((ROOT / "recipes" / name).read_text().splitlines()) < MAX_LINES
