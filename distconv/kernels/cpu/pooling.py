"""Max-pooling, float32: of 2 x 2 windows that lie side by side, and of any others."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from distconv.kernels.compiled import compiled
from distconv.kernels.cpu.aligned import empty
from distconv.kernels.cpu.vector import LANES, Bytes, Index, Pointer, Sum, emitted, repeat, zeros
from distconv.kernels.interface import output_size

Array = NDArray[Any]


def max_pool_forward(x: Array, K: int, stride: int, pad: int) -> tuple[Array, Array]:
    """Largest of each window of x (N, H, W, C) -> y (N, OH, OW, C), and which of its K * K numbers (uint8, K <= 16).

    C is a multiple of 16. The first of equal elements counts, and the last that is not a number above all others; rows
    and columns that fill no window are left out.
    """
    N, H, W, C = x.shape
    y = empty(N, output_size(H, K, stride, pad), output_size(W, K, stride, pad), C)
    winner = np.empty(y.shape, np.uint8)
    if (K, stride, pad) == (2, 2, 0):
        _forward(np.ascontiguousarray(x), y, winner)
    else:
        _forward_any(np.ascontiguousarray(x), K, stride, pad, y, winner)
    return y, winner


def max_pool_backward(dy: Array, winner: Array, K: int, stride: int, pad: int, shape: tuple[int, ...]) -> Array:
    """Gradient dx of the given shape (N, H, W, C): each dy goes to the element that won its window."""
    dx, dy = empty(*shape), np.ascontiguousarray(dy)
    if (K, stride, pad) == (2, 2, 0):
        dx[:, 2 * dy.shape[1] :] = 0
        dx[:, :, 2 * dy.shape[2] :] = 0
        _backward(dy, winner, dx)
    else:
        _backward_any(dy, winner, K, stride, pad, dx)
    return dx


@emitted
def pool_window(
    builder: ir.IRBuilder, x: Pointer, at: Index, below: Index, C: Index, y: Pointer, winner: Pointer, to: Index
) -> None:
    """y and winner of LANES channels of the window at x[at]; `below` leads from a row of x to the next."""
    best, which = (x + at).load(), Bytes.all(builder, 0)
    for i in range(1, 4):
        value = (x + at + below * (i // 2) + C * (i % 2)).load()
        larger = value.wins(best)
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


@emitted
def any_window(
    builder: ir.IRBuilder, x: Pointer, at: Index, rows: Index, columns: Index, below: Index, C: Index, first: Index,
    K: Index, y: Pointer, winner: Pointer, to: Index
) -> None:  # fmt: skip
    """y and winner of LANES channels of rows x columns pixels from x[at] on; the first is number `first` of K * K."""
    best, which = Sum((x + at).load()), Sum(Bytes.spread(first))
    with repeat(rows) as row, repeat(columns) as column:
        value, before = (x + at + below * row + C * column).load(), best.get()
        larger = value.wins(before)
        best.set(value.where(larger, before))
        which.set(Bytes.spread(first + K * row + column).where(larger, which.get()))
    (y + to).store(best.get())
    which.get().store(winner + to)


@emitted
def pixel_adjoint(
    builder: ir.IRBuilder, dy: Pointer, winner: Pointer, at: Index, rows: Index, columns: Index, below: Index, C: Index,
    last: Index, K: Index, stride: Index, dx: Pointer, to: Index
) -> None:  # fmt: skip
    """dx of LANES channels of a pixel, which rows x columns windows see; in the first, it is number `last` of K * K."""
    total, zero = Sum(zeros(builder)), zeros(builder)
    with repeat(rows) as row, repeat(columns) as column:
        place = at + below * row + C * column
        number = last + (K * row + column) * stride * -1  # a window farther on has the pixel in front
        total.set(total.get() + (dy + place).load().where(Bytes.load(winner + place).equal(number), zero))
    (dx + to).store(total.get())


@compiled
def _span(first: int, count: int, limit: int) -> tuple[int, int]:
    """The part of first .. first + count that lies in 0 .. limit: where it begins, and how many."""
    begin = max(first, 0)
    return begin, min(first + count, limit) - begin


@compiled
def _forward_any(x: Array, K: int, stride: int, pad: int, y: Array, winner: Array) -> None:
    _, H, W, C = x.shape
    N, OH, OW, _ = y.shape
    for n in range(N):
        for oh in range(OH):
            h, rows = _span(oh * stride - pad, K, H)
            for ow in range(OW):
                w, columns = _span(ow * stride - pad, K, W)
                first = (h - oh * stride + pad) * K + w - ow * stride + pad
                at, to = ((n * H + h) * W + w) * C, ((n * OH + oh) * OW + ow) * C
                for c in range(0, C, LANES):
                    any_window(x, at + c, rows, columns, W * C, C, first, K, y, winner, to + c)


@compiled
def _backward_any(dy: Array, winner: Array, K: int, stride: int, pad: int, dx: Array) -> None:
    _, H, W, C = dx.shape
    N, OH, OW, _ = dy.shape
    for n in range(N):
        for h in range(H):
            oh = max(0, (h + pad - K + stride) // stride)  # the first window that reaches so far
            rows = min((h + pad) // stride + 1, OH) - oh
            for w in range(W):
                ow = max(0, (w + pad - K + stride) // stride)
                columns = min((w + pad) // stride + 1, OW) - ow
                last = (h + pad - oh * stride) * K + w + pad - ow * stride
                at, to = ((n * OH + oh) * OW + ow) * C, ((n * H + h) * W + w) * C
                for c in range(0, C, LANES):
                    pixel_adjoint(dy, winner, at + c, rows, columns, OW * C, C, last, K, stride, dx, to + c)


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
