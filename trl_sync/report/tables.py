"""Tables and lists of facts as HTML; every value is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trl_sync.report.text import count, escape, show_value


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], limit: int = 400) -> str:
    """A table that scrolls sideways where it is too wide."""
    head = "".join(f"<th>{escape(name, 80)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(show_value(cell), limit)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def definitions(facts: Mapping[str, Any], limit: int = 400) -> str:
    """Names and values, one pair a line."""
    pairs = "".join(
        f"<dt>{escape(name, 80)}</dt><dd>{escape(show_value(value), limit)}</dd>"
        for name, value in facts.items()
    )
    return f"<dl>{pairs}</dl>"


def tiles(facts: Sequence[tuple[str, str, str]]) -> str:
    """Figures to be seen first: name, value, and the class that colours it or none."""
    boxes = "".join(
        f'<div><span>{escape(name, 80)}</span><b class="{kind}">{escape(value, 80)}</b></div>'
        for name, value, kind in facts
    )
    return f'<div class="tiles">{boxes}</div>'


def not_shown(number: int, noun: str) -> str:
    """A note on what was left out; nothing if nothing was."""
    return f'<p class="note">{count(number, noun)} not shown.</p>' if number > 0 else ""
