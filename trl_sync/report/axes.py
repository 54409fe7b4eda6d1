"""Axes of a plot: where ticks lie, what they say, and where a number falls."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Numbers from `low` to `high` on the pixels from `start` to `end`, which may run backwards."""

    low: float
    high: float
    start: float
    end: float

    def place(self, number: float) -> float:
        share = (number - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """A range around both that is never empty."""
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, 1e-100):
        pad = 0.1 * size if size > 1e-100 else 1.0
        return low - pad, high + pad
    pad = share * (high - low)
    return low - pad, high + pad


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in the range: multiples of 1, 2 or 5 times a power of ten."""
    step = tick_step((high - low) / about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, min(last, first + 3 * about) + 1)]


def tick_step(size: float) -> float:
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= 0.999 * size)


def whole_ticks(low: int, high: int, about: int = 8) -> list[int]:
    """Whole numbers in the range, the first and the last of them round."""
    if low == high:
        return [low]
    step = max(1, round(tick_step((high - low) / about)))
    return list(range(-(-low // step) * step, high + 1, step))


def tick_text(number: float, step: float) -> str:
    """A tick's number with as many digits as its neighbours need."""
    if abs(number) < 1e-6 * step:
        return "0"
    if step >= 1e8 or step < 1e-4:
        return _power(f"{number:.2e}")
    if step >= 1e5:
        return f"{number / 1e6:g}M"
    if step >= 1000:
        return f"{number / 1e3:g}k"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{number:,.{decimals}f}"


def _power(text: str) -> str:
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
