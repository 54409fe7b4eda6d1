"""docs/api.md is what the docstrings say today."""

from __future__ import annotations

import re

import api_page


def test_the_page_is_made_from_the_docstrings() -> None:
    assert api_page.PAGE.read_text() == api_page.page(), "python tests/docs/api_page.py"


def test_every_public_name_has_a_section() -> None:
    sections = re.findall(r"^### (\S+)$", api_page.PAGE.read_text(), re.MULTILINE)
    assert {"trl_sync.PPOTrainer", "trl_sync.SyncAuditor", "trl_sync.legacy.PPOTrainer"} <= set(
        sections
    )
    assert len(sections) == len(set(sections))
