"""Optimizer steps in one pass over the vectors: NumPy would take a pass, and a temporary array, for each operation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from distconv.kernels.compiled import compiled

SUMS = 64  # fewer, and the compiler unrolls the loop over them into numbers one by one


@compiled
def adam(p: Any, g: Any, m: Any, v: Any, gain1: Any, gain2: Any, rate: Any, epsilon: Any) -> None:
    """m += gain1 (g - m); v += gain2 (g g - v); p -= rate m / (sqrt(v) + epsilon), on vectors (n,) of one dtype.

    The other numbers are scalars of that dtype, or the arithmetic would be in float64.
    """
    for i in range(p.size):
        m[i] += gain1 * (g[i] - m[i])
        v[i] += gain2 * (g[i] * g[i] - v[i])
        p[i] -= rate * m[i] / (math.sqrt(v[i]) + epsilon)


@compiled
def adam_direction(g: Any, m: Any, v: Any, gain1: Any, gain2: Any, scale1: Any, scale2: Any, epsilon: Any) -> Any:
    """m and v as in `adam`; returns scale1 m / (scale2 sqrt(v) + epsilon) (n,)."""
    u = np.empty_like(g)
    for i in range(g.size):
        m[i] += gain1 * (g[i] - m[i])
        v[i] += gain2 * (g[i] * g[i] - v[i])
        u[i] = scale1 * m[i] / (scale2 * math.sqrt(v[i]) + epsilon)
    return u


@compiled
def squared_norm(x: Any) -> float:
    """The sum of the squares of a vector (n,), in float64 and, on every processor, in the same order.

    SUMS numbers side by side go into as many sums, which the compiler may therefore keep in vectors of any width.
    """
    sums = np.zeros(SUMS)
    for start in range(0, x.size, SUMS):
        part = x[start : start + SUMS]
        for i in range(part.size):
            sums[i] += np.float64(part[i]) ** 2  # float() would leave float32 as it is
    total = 0.0
    for i in range(SUMS):
        total += sums[i]
    return total


@compiled
def norm(x: Any) -> float:
    """The length of a vector (n,), summed up in float64 and in order."""
    return math.sqrt(squared_norm(x))


@compiled
def average(ema: Any, p: Any, share: Any) -> None:
    """ema += share (p - ema), on vectors (n,) of the dtype of share."""
    for i in range(p.size):
        ema[i] += share * (p[i] - ema[i])


@compiled
def checksum(words: Any) -> Any:
    """The sum of unsigned 32-bit words (n,): another value of any one of them makes another sum."""
    total = np.uint64(0)
    for i in range(words.size):
        total += words[i]
    return total
