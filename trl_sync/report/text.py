"""Values of a run as text of a page: escaped, cut to a length, numbers to a few digits."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

# All that is drawn fits into this; beyond it differences of two numbers overflow.
_LARGEST = 1e150
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_MOST_DIGITS = 15


def escape(value: Any, limit: int = 400) -> str:
    """`value` as text of HTML, also inside an attribute's quotes; what is cut off is said.

    What would change the page in other ways (control characters, changes of the direction of
    writing, halves of surrogate pairs) is replaced.
    """
    text = value if isinstance(value, str) else plain(value)
    cut = len(text) - limit
    if cut > 0:
        text = f"{text[:limit]} [{cut:,} more characters]"
    text = _UNPRINTABLE.sub("\ufffd", text).encode("utf-8", "replace").decode("utf-8")
    return html.escape(text, quote=True)


def plain(value: Any) -> str:
    """A value of JSON as a reader would write it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return show(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**_MOST_DIGITS:
        return str(value)
    if value is None:
        return "none"
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError):
        return "a value that cannot be shown"


def finite(value: Any) -> float | None:
    """`value` as a number that can be drawn; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and abs(number) < _LARGEST else None


def show(number: float) -> str:
    """A number to four digits; a whole one in full, with commas."""
    if math.isfinite(number) and number == int(number) and abs(number) < 10**_MOST_DIGITS:
        return f"{int(number):,}"
    return f"{number:.4g}"


def show_value(value: Any) -> str:
    """A value of JSON; numbers as in `show`."""
    number = finite(value)
    return plain(value) if number is None else show(number)


def spans(numbers: Sequence[int], limit: int = 12) -> str:
    """Sorted whole numbers as `0-3, 6`, with no more than `limit` parts."""
    parts: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if parts and parts[-1][1] == number - 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    shown = [f"{low}" if low == high else f"{low}-{high}" for low, high in parts[:limit]]
    return ", ".join(shown) + (" ..." if len(parts) > limit else "")


def join(parts: Iterable[str]) -> str:
    """Pieces of HTML, one a line."""
    return "\n".join(part for part in parts if part)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
