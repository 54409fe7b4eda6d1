"""The tables of docs/memory.md are what the calculator says."""

from __future__ import annotations

import memory_page


def test_the_tables_are_computed() -> None:
    text = memory_page.PAGE.read_text()
    assert text.count(": computed -->") == len(memory_page.TABLES)
    assert memory_page.filled(text) == text, "python tests/docs/memory_page.py"
