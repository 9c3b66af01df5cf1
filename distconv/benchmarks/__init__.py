"""What `python -m distconv.bench` measures and predicts; these files print nothing. Here: numbers on a command line."""

from __future__ import annotations

import re
from collections.abc import Mapping

from distconv.errors import UsageError

ELEMENTS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
MOST = 2**31 - 1  # of what is counted one by one
MOST_NUMBERS = 10**12  # of a vector: the largest models have a fifth of it
LARGEST = 1e30  # and its inverse the smallest: products of a few such quantities stay finite
BITS_PER_SECOND = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def rank_list(text: str) -> list[int]:
    """The numbers of `1,2,4`, each once, in order. Raises UsageError."""
    if not re.fullmatch(r"0*[1-9]\d{0,6}(,0*[1-9]\d{0,6})*", text):
        raise UsageError(f"--ranks {text}: expected numbers of ranks such as 1,2,4")
    return sorted({int(word) for word in text.split(",")})


def at_least_1(flag: str, value: int, most: int = MOST) -> None:
    if not 1 <= value <= most:
        raise UsageError(f"{flag} {value}: expected a whole number from 1 to {most}")


def quantity(flag: str, text: str, units: Mapping[str, float], example: str) -> float:
    """A number above 0 with its unit. Raises UsageError."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(e-?\d+)?([A-Za-z]*)", text)
    value = float(match[1] + (match[2] or "")) * units.get(match[3], 0) if match else 0.0
    if not 1 / LARGEST <= value <= LARGEST:
        names = ", ".join(name for name in units if name)
        unit = f" with its unit ({names})" * bool(names) + " or no unit" * (bool(names) and "" in units)
        largest = f" up to {LARGEST:g}" * (value > LARGEST)
        raise UsageError(f"{flag} {text}: expected a number above 0{largest}{unit}, {example} say")
    return value
