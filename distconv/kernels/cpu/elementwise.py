"""What is done number by number, in one pass where NumPy takes two or three; and arrays side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distconv.kernels.compiled import compiled
from distconv.kernels.cpu.aligned import empty
from distconv.kernels.interface import Array

ZERO = np.float32(0)
BLOCK = 1 << 15  # numbers, a small part of a core's second cache


def relu(x: Array) -> Array:
    """max(x, 0)"""
    y: Array = np.maximum(x, 0)
    return y


def relu_backward(dy: Array, y: Array) -> Array:
    """dx = dy where y = max(x, 0) is positive, else 0 (the slope at 0 is taken as 0)."""
    if y.dtype == dy.dtype == np.float32:
        dx = empty(*y.shape)
        _behind_relu(*(np.ascontiguousarray(array).reshape(-1) for array in (dy, y)), dx.reshape(-1))
        return dx
    slope: Array = dy * (y > 0)
    return slope


def plus(x: Array, other: Array, relu: bool) -> Array:
    """x + other and, if asked, ReLU."""
    if relu and x.dtype == other.dtype == np.float32:
        y = empty(*x.shape)
        _add_and_cut(*(np.ascontiguousarray(array).reshape(-1) for array in (x, other)), y.reshape(-1))
        return y
    total: Array = x + other
    return np.maximum(total, 0, out=total) if relu else total


def total(parts: Sequence[Array]) -> Array:
    """The sum of arrays of one shape, in their order, block by block: so it goes to memory once."""
    first, *others = (np.ascontiguousarray(part).reshape(-1) for part in parts)
    y = np.empty_like(first)
    for start in range(0, y.size, BLOCK):
        block = slice(start, start + BLOCK)
        y[block] = first[block]
        for other in others:
            y[block] += other[block]
    return y.reshape(parts[0].shape)


def scale(x: Array, factor: float) -> Array:
    """x times a number."""
    y: Array = x * factor
    return y


def join_channels(parts: Sequence[Array]) -> Array:
    """Arrays (..., C) side by side, (..., sum of C)."""
    return np.concatenate(parts, axis=-1)


def split_channels(x: Array, sizes: Sequence[int]) -> Sequence[Array]:
    """The adjoint of join_channels: x (..., sum of sizes) -> contiguous arrays of so many channels each."""
    return [np.ascontiguousarray(part) for part in np.split(x, np.cumsum(sizes)[:-1], axis=-1)]


@compiled
def _add_and_cut(x: Any, other: Any, y: Any) -> None:
    """y = max(x + other, 0), vectors (n,) of float32; what is not a number stays."""
    for i in range(x.size):
        total = x[i] + other[i]
        y[i] = ZERO if total < 0 else total


@compiled
def _behind_relu(dy: Any, y: Any, dx: Any) -> None:
    """dx = dy where y is positive, else 0, vectors (n,) of float32."""
    for i in range(y.size):
        dx[i] = dy[i] if y[i] > 0 else ZERO
