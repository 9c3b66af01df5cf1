"""Convolution of images of one channel with 3 x 3 filters, stride 1, float32: nine products a pixel, no patches."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from distconv.kernels.compiled import compiled
from distconv.kernels.cpu.aligned import empty
from distconv.kernels.cpu.vector import LANES, Index, Pointer, Sum, Vector, emitted, repeat, zeros

Array = NDArray[Any]


def conv_forward(x: Array, w: Array, b: Array, stride: int, pad: int, relu: bool) -> Array:
    """Convolution, bias and, if asked, ReLU: x (N, H, W, 1), w (3, 3, 1, F), b (F,) -> y (N, OH, OW, F), all float32.

    F is a multiple of 16, stride is 1.
    """
    padded = _padded(x, pad)
    N, H, W = padded.shape
    y = empty(N, H - 2, W - 2, w.shape[3])
    _forward(padded, w, b, np.float32(0.0 if relu else -np.inf), y)
    return y


def conv_backward(
    x: Array, y: Array, dy: Array, w: Array, stride: int, pad: int, relu: bool, dw: Array, db: Array, wants_dx: bool
) -> None:
    """The adjoint of conv_forward, as far as it concerns the filters: add to dw (3, 3, 1, F) and db (F,)."""
    padded = _padded(x, pad)
    y, dy = (np.ascontiguousarray(array, np.float32) for array in (y, dy))
    _backward(padded, y, dy, np.float32(0.0 if relu else np.nan), dw, db)


def _padded(x: Array, pad: int) -> Array:
    """x (N, H, W, 1) -> (N, H + 2 pad, W + 2 pad), zeros around; np.pad takes as long as a convolution of 25 images."""
    N, H, W, _ = x.shape
    padded = np.zeros((N, H + 2 * pad, W + 2 * pad), x.dtype)
    padded[:, pad : pad + H, pad : pad + W] = x[..., 0]
    return padded


@emitted
def row_forward(
    builder: ir.IRBuilder, x: Pointer, above: Index, W: Index, w: Pointer, f: Index, F: Index, b: Pointer,
    floor: Vector, y: Pointer, to: Index, OW: Index
) -> None:  # fmt: skip
    """A row of y, LANES filters from f on, from three rows of x."""
    filters = [(w + f + F * tap).load() for tap in range(9)]
    bias = (b + f).load()
    with repeat(OW) as column:
        total = bias
        for tap, weights in enumerate(filters):
            total = (x + above + W * (tap // 3) + column + tap % 3).spread().times(weights, total)
        (y + to + F * column).store(total.at_least(floor))


@emitted
def row_backward(
    builder: ir.IRBuilder, x: Pointer, above: Index, W: Index, dy: Pointer, y: Pointer, floor: Vector, at: Index,
    OW: Index, dw: Pointer, f: Index, F: Index, db: Pointer
) -> None:  # fmt: skip
    """Add to dw and db, for LANES filters from f on, what a row of dy brings; dy counts only where y > floor."""
    places = [dw + f + F * tap for tap in range(9)]
    sums = [Sum(place.load()) for place in places]
    bias = Sum((db + f).load())
    with repeat(OW) as column:
        pixel = at + F * column
        gradient = (dy + pixel).load().where((y + pixel).load().above(floor), zeros(builder))
        bias.set(bias.get() + gradient)
        for tap, total in enumerate(sums):
            value = (x + above + W * (tap // 3) + column + tap % 3).spread()
            total.set(value.times(gradient, total.get()))
    for place, total in zip(places, sums, strict=True):
        place.store(total.get())
    (db + f).store(bias.get())


@compiled
def _forward(x: Array, w: Array, b: Array, floor: np.float32, y: Array) -> None:
    _, H, W = x.shape
    N, OH, OW, F = y.shape
    for n in range(N):
        for h in range(OH):
            for f in range(0, F, LANES):
                row_forward(x, (n * H + h) * W, W, w, f, F, b, floor, y, (n * OH + h) * OW * F + f, OW)


@compiled
def _backward(x: Array, y: Array, dy: Array, floor: np.float32, dw: Array, db: Array) -> None:
    _, H, W = x.shape
    N, OH, OW, F = dy.shape
    for n in range(N):
        for h in range(OH):
            for f in range(0, F, LANES):
                row_backward(x, (n * H + h) * W, W, dy, y, floor, (n * OH + h) * OW * F + f, OW, dw, f, F, db)
