"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any


def percent(value: float) -> str:
    """A score: a share, or a number of a user's own metric that is none."""
    return f"{value:.2%}" if 0 <= value <= 1 else f"{value:,.4g}"


def format_of_scores(lines: Iterable[Any]) -> Callable[[float], str]:
    """One for all scores of a chart, and its axis: percent where they are shares, each line of them an array.

    Else an axis of rewards would go from 0.00% by 100.00% to 2.
    """
    are_shares = all(0 <= value <= 1 for line in lines for value in line if math.isfinite(value))
    return percent if are_shares else "{:,.4g}".format


def short(value: float) -> str:
    """Three digits, or all before the point."""
    if math.isfinite(value) and abs(value) >= 999.5:  # three digits of which are 1e+03
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:.3g}"


def amount(value: float) -> str:
    """A count in full; of a sum that is none, as a user's own task may have it, six digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def loss(value: float, digits: int = 4) -> str:
    """A loss, with so many digits behind the point; one that has diverged may have thirty before it, but is short."""
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def milliseconds(value: float) -> str:
    return f"{short(value)} ms"


def in_bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("kB", 1000)):
        if value >= size:
            return f"{short(value / size)} {unit}"
    return f"{value:.0f} bytes"


def duration(seconds: float) -> str:
    """Of seconds."""
    hours, rest = divmod(round(seconds), 3600)
    if hours:
        return f"{hours} h {rest // 60} min"
    if rest >= 600:
        return f"{rest / 60:.0f} min"
    return f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{seconds:.1f} s"


def plural(number: int, noun: str) -> str:
    """1 step, 2 steps"""
    return f"{number:,} {noun}{'s' * (number != 1)}"
