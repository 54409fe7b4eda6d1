"""What a check against a manifest found, and a readable report of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "added",
    "another_base",
    "changed",
    "dtype",
    "edited",
    "missing",
    "not_comparable",
    "replaced",
    "shape",
    "truncated",
    "unexpected",
    "unreadable",
    "unverified",
]

# In place of a tensor's name: the part of a safetensors file before the data.
HEADER = "(header)"
SHOWN_IN_FULL = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One difference between a manifest and what is there.

    `place` is a scope ("trainable") or a file by its path in the checkpoint; `name` the tensor in
    it, `HEADER`, or None where the place as a whole is meant.
    """

    kind: Kind
    place: str
    name: str | None
    detail: str

    def __str__(self) -> str:
        where = self.place if self.name is None else f"{self.place}: {self.name}"
        return _on_one_line(f"{where}: {self.kind}, {self.detail}")


def describe(problems: Sequence[Problem]) -> str:
    """A report of a few lines: the first problems in full, the others counted by kind and place."""
    if not problems:
        return "No problems: everything is as the manifest says."
    noun = "problem" if len(problems) == 1 else "problems"
    lines = [f"{len(problems)} {noun}:"] + [f"- {p}" for p in problems[:SHOWN_IN_FULL]]
    rest = Counter((p.place, p.kind) for p in problems[SHOWN_IN_FULL:])
    more = [f"- {place}: {count} more {kind}" for (place, kind), count in rest.items()]
    return "\n".join(lines + [_on_one_line(line) for line in more])


def _on_one_line(text: str) -> str:
    """`text` with line ends and control characters spelled out: names come from files."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
