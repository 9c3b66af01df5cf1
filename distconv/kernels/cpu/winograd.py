"""Convolution with 3 x 3 filters, stride 1, float32: a quarter of the multiplications.

Winograd's minimal filtering F(4x4, 3x3) as Lavin and Gray 2015 (arXiv 1509.09308) use it. An output tile of 4 x 4
pixels is y = A' [(G w G') * (B' x B)] A, where x is the input tile of 6 x 6, ' transposes, and * multiplies the 36
elements one by one; summed over channels, that is 36 matrix products. The gradients are the adjoints of these steps.
A few tiles pass through all steps at a time, so that what lies between them stays in a core's cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.kernels.compiled import compiled
from distconv.kernels.cpu.aligned import empty
from distconv.kernels.cpu.padded import copy_in, copy_out
from distconv.kernels.cpu.products import ROWS, product
from distconv.kernels.cpu.tiles import (
    PATCH,
    TILE,
    filter_tile,
    filter_tile_adjoint,
    input_tile,
    input_tile_adjoint,
    output_tile,
    output_tile_adjoint,
    pooled_tile,
    pooled_tile_adjoint,
)
from distconv.kernels.cpu.vector import LANES
from distconv.kernels.cpu.zero_windows import fill_zero_windows, zero_windows

Array = NDArray[Any]
LINE = 16  # floats of a cache line
CACHE = 1 << 17  # floats: half of a core's L2 cache to fill with tiles; 2^14 to 2^18 measured within 3 %


def pays(OH: int, OW: int) -> bool:
    """Whether the tiles of an output of this size are more than half full; direct.py is faster where they are not."""
    return TILE * TILE * -(-OH // TILE) * -(-OW // TILE) < 2 * OH * OW


def conv_forward(x: Array, w: Array, b: Array, stride: int, pad: int, relu: bool) -> Array:
    """Convolution, bias and, if asked, ReLU: x (N, H, W, C), w (3, 3, C, F), b (F,) -> y (N, OH, OW, F), all float32.

    C and F are multiples of 16, stride is 1.
    """
    N, H, W, _ = x.shape
    y = empty(N, H + 2 * pad - 2, W + 2 * pad - 2, w.shape[3])
    _run_forward(x, w, b, pad, relu, y, np.empty((0, 0, 0, 0), np.uint8))
    return y


def conv_pool_forward(x: Array, w: Array, b: Array, stride: int, pad: int, relu: bool) -> tuple[Array, Array]:
    """conv_forward and then max_pool_forward of pooling.py -> (y, winner), where SHUT is a winner, too."""
    N, H, W, _ = x.shape
    y = empty(N, (H + 2 * pad - 2) // 2, (W + 2 * pad - 2) // 2, w.shape[3])
    winner = np.empty(y.shape, np.uint8)
    _run_forward(x, w, b, pad, relu, y, winner)
    return y, winner


def _run_forward(x: Array, w: Array, b: Array, pad: int, relu: bool, y: Array, winner: Array) -> None:
    C, F = w.shape[2:]
    few, v, m, padded, blank, still = _room(x.shape, F, pad)
    u = empty(36, C * F + LINE)
    floor, bend = np.float32(0.0 if relu else -np.inf), np.float32(0.0 if relu else np.nan)
    _filters(np.ascontiguousarray(w), u)
    _forward(np.ascontiguousarray(x), u, b, pad, floor, bend, few, v, m, padded, blank, still, y, winner)


def conv_backward(
    x: Array, y: Array, dy: Array, w: Array, stride: int, pad: int, relu: bool, dw: Array, db: Array, wants_dx: bool
) -> Array | None:
    """The adjoint of conv_forward: add to dw (3, 3, C, F) and db (F,), return dx (N, H, W, C) if it is wanted."""
    bend = np.float32(0.0 if relu else np.nan)
    return _run_backward(x, y, np.empty((0, 0, 0, 0), np.uint8), dy, w, pad, bend, dw, db, wants_dx)


def conv_pool_backward(
    x: Array,
    winner: Array,
    dy: Array,
    w: Array,
    stride: int,
    pad: int,
    relu: bool,
    dw: Array,
    db: Array,
    wants_dx: bool,
) -> Array | None:
    """The adjoint of conv_pool_forward."""
    return _run_backward(x, dy, winner, dy, w, pad, np.float32(np.nan), dw, db, wants_dx)


def _run_backward(
    x: Array, y: Array, winner: Array, dy: Array, w: Array, pad: int, bend: np.float32, dw: Array, db: Array,
    wants_dx: bool
) -> Array | None:  # fmt: skip
    C, F = w.shape[2:]
    few, v, m, padded, blank, still = _room(x.shape, F, pad)
    turned = empty(36, F * C + LINE)
    _filters(np.ascontiguousarray(w.transpose(0, 1, 3, 2)), turned)
    du = empty(36, C * F + LINE)
    if not len(x):
        du[...] = 0  # else the first round overwrites it
    dx, sums = empty(*(x.shape if wants_dx else (0, 0, 0, 0))), empty(*padded.shape)
    x, y, dy = (np.ascontiguousarray(array) for array in (x, y, dy))
    _backward(x, y, winner, dy, turned, pad, bend, few, v, m, padded, blank, still, sums, du, db, dx, wants_dx)
    _filters_adjoint(du, dw)
    return dx if wants_dx else None


def _room(shape: tuple[int, ...], F: int, pad: int) -> tuple[int, Array, Array, Array, Array, Array]:
    """How many tiles of x (N, H, W, C) to take at a time, and room for them, seen from both sides.

    And for an image among zeros, for which of its pixels are 0, and for which windows of the images at hand hold zeros
    alone. All filters pass through the cache with every round, so large filters call for more tiles a round.
    """
    N, H, W, C = shape
    down, across = (-(-(size + 2 * pad - 2) // TILE) for size in (H, W))
    tiles = N * down * across
    few = max(1, (CACHE + 2 * 36 * C * F) // (36 * (C + F)))
    few = -(-tiles // -(-tiles // few)) if N else 1  # as many rounds, but even ones: filters pass with a short one too
    few = -(-few // ROWS) * ROWS
    grid = TILE * down + PATCH - TILE, TILE * across + PATCH - TILE
    padded = empty(*grid, C)
    padded[...] = 0
    # 0 behind the image and its padding: windows there give no output, nor do those that go across the end of a row.
    blank = np.zeros((grid[0], grid[1] + 1), np.uint8)
    blank[: H + 2 * pad, : W + 2 * pad] = 1
    still = np.empty((few // (down * across) + 2, *blank.shape), np.uint8)  # of all images that a round may touch
    # An odd number of cache lines between the 36 elements of a tile, or they would all fall into the same few places.
    return few, empty(36, few * C + LINE), empty(36, few * F + LINE), padded, blank, still


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
def _inputs(x: Array, first: int, tiles: int, pad: int, padded: Array, blank: Array, still: Array, v: Array) -> None:
    PH, PW, C = padded.shape
    down, across = PH // TILE, PW // TILE
    stride = v.shape[1]
    n, h, w = _place(first, down, across)
    for t in range(tiles):
        if t == 0 or (h == 0 and w == 0):
            copy_in(x, n, pad, padded, blank)
            zero_windows(blank, still[n % len(still)])
        for c in range(0, C, LANES):
            input_tile(padded, TILE * (h * PW + w) * C + c, PW, C, v, t * C + c, stride)
        n, h, w = _next(n, h, w, down, across)


@compiled
def _inputs_adjoint(v: Array, first: int, tiles: int, pad: int, sums: Array, dx: Array) -> None:
    PH, PW, C = sums.shape
    down, across = PH // TILE, PW // TILE
    stride = v.shape[1]
    n, h, w = _place(first, down, across)
    for t in range(tiles):
        if h == 0 and w == 0:
            sums[...] = 0
        for c in range(0, C, LANES):
            input_tile_adjoint(v, t * C + c, stride, sums, TILE * (h * PW + w) * C + c, PW, C)
        if h == down - 1 and w == across - 1:
            copy_out(sums, pad, dx, n)
        n, h, w = _next(n, h, w, down, across)


@compiled
def _place(t: int, down: int, across: int) -> tuple[int, int, int]:
    """The image, row and column of a tile."""
    return t // (down * across), t // across % down, t % across


@compiled
def _next(n: int, h: int, w: int, down: int, across: int) -> tuple[int, int, int]:
    """Those of the tile that follows."""
    if w + 1 < across:
        return n, h, w + 1
    return (n, h + 1, 0) if h + 1 < down else (n + 1, 0, 0)


@compiled
def _outputs(
    m: Array, first: int, tiles: int, b: Array, floor: np.float32, bend: np.float32, still: Array, y: Array,
    winner: Array
) -> None:  # fmt: skip
    _, OH, OW, F = y.shape
    _, PH, width = still.shape
    down, across = PH // TILE, width // TILE
    stride, pooled = m.shape[1], winner.size > 0
    n, h, w = _place(first, down, across)
    for t in range(tiles):
        image, windows = n * OH * OW * F, still[n % len(still)]
        looks = windows[-1, -1]
        for f in range(0, F, LANES):
            if pooled:
                pooled_tile(
                    m, t * F + f, stride, b, f, floor, bend, windows, TILE * (h * width + w), width, looks, y, winner,
                    image + f, 2 * h, 2 * w, OH, OW, F
                )  # fmt: skip
            else:
                output_tile(m, t * F + f, stride, b, f, floor, y, image + f, TILE * h, TILE * w, OH, OW, F)
        if looks and not pooled:
            fill_zero_windows(windows, TILE * h, TILE * w, b, floor, y[n])
        n, h, w = _next(n, h, w, down, across)


@compiled
def _outputs_adjoint(
    dy: Array, y: Array, winner: Array, first: int, tiles: int, down: int, across: int, bend: np.float32, db: Array,
    m: Array
) -> None:  # fmt: skip
    _, OH, OW, F = dy.shape
    stride, pooled = m.shape[1], winner.size > 0
    n, h, w = _place(first, down, across)
    for t in range(tiles):
        image = n * OH * OW * F
        for f in range(0, F, LANES):
            if pooled:
                pooled_tile_adjoint(
                    dy, winner, image + f, 2 * h, 2 * w, OH, OW, F, db, f, m, t * F + f, stride
                )  # fmt: skip
            else:
                output_tile_adjoint(
                    dy, y, bend, image + f, TILE * h, TILE * w, OH, OW, F, db, f, m, t * F + f, stride
                )  # fmt: skip
        n, h, w = _next(n, h, w, down, across)


@compiled
def _forward(
    x: Array, u: Array, b: Array, pad: int, floor: np.float32, bend: np.float32, few: int, v: Array, m: Array,
    padded: Array, blank: Array, still: Array, y: Array, winner: Array
) -> None:  # fmt: skip
    PH, PW, C = padded.shape
    N, F = y.shape[0], y.shape[3]
    u_stride, v_stride, m_stride = u.shape[1], v.shape[1], m.shape[1]
    all_tiles = N * (PH // TILE) * (PW // TILE)
    for first in range(0, all_tiles, few):
        tiles = min(few, all_tiles - first)
        rows = (tiles + ROWS - 1) // ROWS * ROWS
        _inputs(x, first, tiles, pad, padded, blank, still, v)
        for p in range(36):
            product(v, p * v_stride, C, 1, u, p * u_stride, F, m, p * m_stride, F, rows, F, C, 0)
        _outputs(m, first, tiles, b, floor, bend, still, y, winner)


@compiled
def _backward(
    x: Array, y: Array, winner: Array, dy: Array, ut: Array, pad: int, bend: np.float32, few: int, v: Array, m: Array,
    padded: Array, blank: Array, still: Array, sums: Array, du: Array, db: Array, dx: Array, wants_dx: bool
) -> None:  # fmt: skip
    PH, PW, C = padded.shape
    N, F = dy.shape[0], dy.shape[3]
    u_stride, v_stride, m_stride = ut.shape[1], v.shape[1], m.shape[1]
    down, across = PH // TILE, PW // TILE
    for first in range(0, N * down * across, few):
        tiles = min(few, N * down * across - first)
        rows = (tiles + ROWS - 1) // ROWS * ROWS
        _inputs(x, first, tiles, pad, padded, blank, still, v)
        _outputs_adjoint(dy, y, winner, first, tiles, down, across, bend, db, m)
        for p in range(36):
            product(v, p * v_stride, 1, C, m, p * m_stride, F, du, p * u_stride, F, C, F, tiles, first > 0)
            if wants_dx:
                product(m, p * m_stride, F, 1, ut, p * u_stride, C, v, p * v_stride, C, rows, C, F, 0)
        if wants_dx:
            _inputs_adjoint(v, first, tiles, pad, sums, dx)
