"""Where tables go: as wide as the terminal, or wide enough for every column where there is none."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 200


def make_console() -> Console:
    """A console on the standard output; plain text of a fixed width where that is no terminal."""
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    return Console(width=width, highlight=False, soft_wrap=False)


def make_table(*columns: str) -> Table:
    """A table with those columns; without rules where there is no terminal."""
    return Table(*columns, box=box.SIMPLE if sys.stdout.isatty() else None, pad_edge=False)
