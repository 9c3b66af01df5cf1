"""Convolution with 3 x 3 filters, stride 1, float32: a quarter of the multiplications.

Winograd's minimal filtering F(4x4, 3x3) as Lavin and Gray 2015 (arXiv 1509.09308) use it. An output tile of 4 x 4
pixels is y = A' [(G w G') * (B' x B)] A, where x is the input tile of 6 x 6, ' transposes, and * multiplies the 36
elements one by one; summed over channels, that is 36 matrix products. The gradients are the adjoints of these steps.
A few images pass through all steps at a time, so that what lies between them stays in a core's cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.kernels.compiled import compiled
from distconv.kernels.cpu.aligned import empty
from distconv.kernels.cpu.products import ROWS, product
from distconv.kernels.cpu.tiles import (
    TILE,
    filter_tile,
    filter_tile_adjoint,
    input_tile,
    input_tile_adjoint,
    output_tile,
    output_tile_adjoint,
)
from distconv.kernels.cpu.vector import LANES
from distconv.kernels.cpu.zero_windows import fill_zero_windows

Array = NDArray[Any]
LINE = 16  # floats of a cache line
CACHE = 1 << 17  # floats: half of a core's L2 cache to fill with tiles; 2^14 to 2^18 measured within 2 %


def pays(OH: int, OW: int) -> bool:
    """Whether the tiles of an output of this size are more than half full; direct.py is faster where they are not."""
    return TILE * TILE * _tiles(OH, OW) < 2 * OH * OW


def conv_forward(x: Array, w: Array, b: Array, stride: int, pad: int, relu: bool) -> Array:
    """Convolution, bias and, if asked, ReLU: x (N, H, W, C), w (3, 3, C, F), b (F,) -> y (N, OH, OW, F), all float32.

    C and F are multiples of 16, stride is 1.
    """
    (N, H, W, C), F = x.shape, w.shape[3]
    y = empty(N, H + 2 * pad - 2, W + 2 * pad - 2, F)
    few, v, m = _room(y.shape, C)
    u = empty(36, C * F + LINE)
    floor, x, w = np.float32(0.0 if relu else -np.inf), np.ascontiguousarray(x), np.ascontiguousarray(w)
    _filters(w, u)
    _forward(x, u, b, pad, floor, few, v, m, y)
    return y


def conv_backward(
    x: Array, y: Array, dy: Array, w: Array, stride: int, pad: int, relu: bool, dw: Array, db: Array, wants_dx: bool
) -> Array | None:
    """The adjoint of conv_forward: add to dw (3, 3, C, F) and db (F,), return dx (N, H, W, C) if it is wanted."""
    C, F = w.shape[2:]
    few, v, m = _room(y.shape, C)
    turned = empty(36, F * C + LINE)
    _filters(np.ascontiguousarray(w.transpose(0, 1, 3, 2)), turned)
    du = empty(36, C * F + LINE)
    if not len(x):
        du[...] = 0  # else the first round overwrites it
    dx = empty(*(x.shape if wants_dx else (0, 0, 0, 0)))
    floor = np.float32(0.0 if relu else np.nan)
    x, y, dy = (np.ascontiguousarray(array) for array in (x, y, dy))
    _backward(x, y, dy, turned, pad, floor, few, v, m, du, db, dx, wants_dx)
    _filters_adjoint(du, dw)
    return dx if wants_dx else None


def _tiles(OH: int, OW: int) -> int:
    return -(-OH // TILE) * -(-OW // TILE)


def _room(shape: tuple[int, ...], C: int) -> tuple[int, Array, Array]:
    """How many images to take at a time for outputs (N, OH, OW, F), and room for their tiles, seen from both sides.

    All filters pass through the cache with every round, so large filters call for more images a round.
    """
    N, OH, OW, F = shape
    tiles = _tiles(OH, OW)
    few = max(1, (CACHE + 2 * 36 * C * F) // (36 * tiles * (C + F)))
    few = -(-N // -(-N // few)) if N else 1  # as many rounds, but even ones: a short one takes the filters through too
    rows = -(-few * tiles // ROWS) * ROWS
    # An odd number of cache lines between the 36 elements of a tile, or they would all fall into the same few places.
    return few, empty(36, rows * C + LINE), empty(36, rows * F + LINE)


@compiled
def _filters(w: Array, u: Array) -> None:
    size = w.size // 9
    for at in range(0, size, LANES):
        filter_tile(w, size, at, u, u.shape[1])


@compiled
def _filters_adjoint(du: Array, dw: Array) -> None:
    size = dw.size // 9
    for at in range(0, size, LANES):
        filter_tile_adjoint(du, du.shape[1], at, dw, size)


@compiled
def _inputs(x: Array, first: int, images: int, pad: int, across: int, down: int, v: Array, stride: int) -> None:
    _, H, W, C = x.shape
    t = 0
    for n in range(first, first + images):
        for h in range(-pad, TILE * down - pad, TILE):
            for w in range(-pad, TILE * across - pad, TILE):
                for c in range(0, C, LANES):
                    input_tile(x, n * H * W * C + c, h, w, H, W, C, v, t * C + c, stride)
                t += 1


@compiled
def _forward(x: Array, u: Array, b: Array, pad: int, floor: np.float32, few: int, v: Array, m: Array, y: Array) -> None:
    N, C = x.shape[0], x.shape[3]
    _, OH, OW, F = y.shape
    down, across = (OH + 3) // 4, (OW + 3) // 4
    u_stride, v_stride, m_stride = u.shape[1], v.shape[1], m.shape[1]
    for first in range(0, N, few):
        images = min(few, N - first)
        tiles = images * down * across
        rows = (tiles + ROWS - 1) // ROWS * ROWS
        _inputs(x, first, images, pad, across, down, v, v_stride)
        for p in range(36):
            product(v, p * v_stride, C, 1, u, p * u_stride, F, m, p * m_stride, F, rows, F, C, 0)
        t = 0
        for n in range(first, first + images):
            for h in range(0, OH, TILE):
                for w in range(0, OW, TILE):
                    for f in range(0, F, LANES):
                        output_tile(m, t * F + f, m_stride, b, f, floor, y, n * OH * OW * F + f, h, w, OH, OW, F)
                    t += 1
        fill_zero_windows(
            x[first : first + images], b, pad, floor, y[first : first + images]
        )  # while they are in the cache


@compiled
def _backward(
    x: Array, y: Array, dy: Array, ut: Array, pad: int, floor: np.float32, few: int, v: Array, m: Array, du: Array,
    db: Array, dx: Array, wants_dx: bool
) -> None:  # fmt: skip
    N, H, W, C = x.shape
    _, OH, OW, F = dy.shape
    down, across = (OH + 3) // 4, (OW + 3) // 4
    u_stride, v_stride, m_stride = ut.shape[1], v.shape[1], m.shape[1]
    for first in range(0, N, few):
        images = min(few, N - first)
        tiles = images * down * across
        rows = (tiles + ROWS - 1) // ROWS * ROWS
        _inputs(x, first, images, pad, across, down, v, v_stride)
        t = 0
        for n in range(first, first + images):
            for h in range(0, OH, TILE):
                for w in range(0, OW, TILE):
                    for f in range(0, F, LANES):
                        at = n * OH * OW * F + f
                        output_tile_adjoint(dy, y, floor, at, h, w, OH, OW, F, db, f, m, t * F + f, m_stride)
                    t += 1
        for p in range(36):
            product(v, p * v_stride, 1, C, m, p * m_stride, F, du, p * u_stride, F, C, F, tiles, first > 0)
            if wants_dx:
                product(m, p * m_stride, F, 1, ut, p * u_stride, C, v, p * v_stride, C, rows, C, F, 0)
        if not wants_dx:
            continue
        dx[first : first + images] = 0
        t = 0
        for n in range(first, first + images):
            for h in range(-pad, TILE * down - pad, TILE):
                for w in range(-pad, TILE * across - pad, TILE):
                    for c in range(0, C, LANES):
                        input_tile_adjoint(v, t * C + c, v_stride, dx, n * H * W * C + c, h, w, H, W, C)
                    t += 1
