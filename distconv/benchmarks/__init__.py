"""What `python -m distconv.bench` measures and predicts; these files print nothing. Here: numbers on a command line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from distconv.errors import UsageError

ELEMENTS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
BITS_PER_SECOND = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def rank_list(text: str) -> list[int]:
    """The numbers of `1,2,4`, each once, in order. Raises UsageError."""
    if not re.fullmatch(r"0*[1-9]\d{0,6}(,0*[1-9]\d{0,6})*", text):
        raise UsageError(f"--ranks {text}: expected numbers of ranks such as 1,2,4")
    return sorted({int(word) for word in text.split(",")})


def at_least_1(flag: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{flag} {value}: expected a whole number from 1 on")


def quantity(flag: str, text: str, units: Mapping[str, float], example: str) -> float:
    """A number above 0 with its unit. Raises UsageError."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-?\d+)?([A-Za-z]*)", text)
    value = float(match[1] + (match[2] or "")) * units.get(match[3], 0) if match else 0.0
    if not 0 < value < math.inf:
        names = ", ".join(name for name in units if name)
        without = " or no unit" if "" in units else ""
        raise UsageError(f"{flag} {text}: expected a number above 0 with its unit ({names}){without}, {example} say")
    return value
