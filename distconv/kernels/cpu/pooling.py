"""Max-pooling of 2 x 2 windows that lie side by side, float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from distconv.kernels.compiled import compiled
from distconv.kernels.cpu.vector import LANES, Bytes, Index, Pointer, emitted, zeros

Array = NDArray[Any]


def max_pool_forward(x: Array) -> tuple[Array, Array]:
    """Largest of each 2 x 2 window of x (N, H, W, C) -> y (N, H // 2, W // 2, C), and which of the four (uint8).

    C is a multiple of 16. The first of equal elements counts; a last odd row or column is left out.
    """
    N, H, W, C = x.shape
    y = np.empty((N, H // 2, W // 2, C), np.float32)
    winner = np.empty(y.shape, np.uint8)
    _forward(np.ascontiguousarray(x), y, winner)
    return y, winner


def max_pool_backward(dy: Array, winner: Array, shape: tuple[int, ...]) -> Array:
    """Gradient dx of the given shape (N, H, W, C): each dy goes to the element that won its window."""
    dx = np.empty(shape, np.float32)
    dx[:, 2 * dy.shape[1] :] = 0
    dx[:, :, 2 * dy.shape[2] :] = 0
    _backward(np.ascontiguousarray(dy), winner, dx)
    return dx


@emitted
def pool_window(
    builder: ir.IRBuilder, x: Pointer, at: Index, below: Index, C: Index, y: Pointer, winner: Pointer, to: Index
) -> None:
    """y and winner of LANES channels of the window at x[at]; `below` leads from a row of x to the next."""
    best, which = (x + at).load(), Bytes.all(builder, 0)
    for i in range(1, 4):
        value = (x + at + below * (i // 2) + C * (i % 2)).load()
        larger = value.exceeds(best)
        best, which = value.where(larger, best), Bytes.all(builder, i).where(larger, which)
    (y + to).store(best)
    which.store(winner + to)


@emitted
def pool_window_adjoint(
    builder: ir.IRBuilder, dy: Pointer, winner: Pointer, at: Index, dx: Pointer, to: Index, below: Index, C: Index
) -> None:
    """dx of LANES channels of the window at dx[to]."""
    gradient, which, zero = (dy + at).load(), Bytes.load(winner + at), zeros(builder)
    for i in range(4):
        (dx + to + below * (i // 2) + C * (i % 2)).store(gradient.where(which.equal(i), zero))


@compiled
def _forward(x: Array, y: Array, winner: Array) -> None:
    _, H, W, C = x.shape
    N, OH, OW, _ = y.shape
    for n in range(N):
        for h in range(OH):
            for w in range(OW):
                at, to = ((n * H + 2 * h) * W + 2 * w) * C, ((n * OH + h) * OW + w) * C
                for c in range(0, C, LANES):
                    pool_window(x, at + c, W * C, C, y, winner, to + c)


@compiled
def _backward(dy: Array, winner: Array, dx: Array) -> None:
    _, H, W, C = dx.shape
    N, OH, OW, _ = dy.shape
    for n in range(N):
        for h in range(OH):
            for w in range(OW):
                at, to = ((n * OH + h) * OW + w) * C, ((n * H + 2 * h) * W + 2 * w) * C
                for c in range(0, C, LANES):
                    pool_window_adjoint(dy, winner, at + c, dx, to + c, W * C, C)
