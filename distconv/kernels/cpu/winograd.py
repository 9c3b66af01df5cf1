"""Convolution with 3 x 3 filters, stride 1, float32: a quarter of the multiplications.

Winograd's minimal filtering F(4x4, 3x3) as Lavin and Gray 2015 (arXiv 1509.09308) use it. An output tile of 4 x 4
pixels is y = A' [(G w G') * (B' x B)] A, where x is the input tile of 6 x 6, ' transposes, and * multiplies the 36
elements one by one; summed over channels, that is 36 matrix products. The gradients are the adjoints of these steps.
A few tiles, a round, pass through all steps at a time, so that what lies between them stays in a core's cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.kernels.cpu import winograd_loops as loops
from distconv.kernels.cpu.aligned import empty
from distconv.kernels.cpu.normalization import NormGradient, rows_of
from distconv.kernels.cpu.tiles import PATCH, TILE
from distconv.kernels.cpu.vector import LINE

Array = NDArray[Any]
# Floats of a core's second cache: for tiles, and for filters, which pass through it with every round. Larger filters
# come from further away, so that more tiles a round are better then.
TILES, FILTERS = 3 << 15, 1 << 17
EVEN = 8  # tiles that a round has a multiple of: as on every processor, for statistics are joined round by round
NO_IMAGES, NO_NUMBERS = np.empty((0, 0, 0, 0), np.float32), np.empty((0, 0))
NO_WINNER = np.empty((0, 0, 0, 0), np.uint8)
NO_CHANNELS = np.empty((5, 0), np.float32)


def pays(OH: int, OW: int) -> bool:
    """Whether the tiles of an output of this size are more than half full; direct.py is faster where they are not."""
    return TILE * TILE * -(-OH // TILE) * -(-OW // TILE) < 2 * OH * OW


def conv_forward(x: Array, w: Array, b: Array, stride: int, pad: int, relu: bool) -> Array:
    """Convolution, bias and, if asked, ReLU: x (N, H, W, C), w (3, 3, C, F), b (F,) -> y (N, OH, OW, F), all float32.

    C and F are multiples of 16, stride is 1.
    """
    y = _room_for_output(x, w, pad)
    _run_forward(x, w, b, pad, relu, y, NO_WINNER, NO_NUMBERS)
    return y


def conv_pool_forward(x: Array, w: Array, b: Array, stride: int, pad: int, relu: bool) -> tuple[Array, Array]:
    """conv_forward and then max_pool_forward of pooling.py -> (y, winner), where SHUT is a winner, too."""
    N, H, W, _ = x.shape
    y = empty(N, (H + 2 * pad - 2) // 2, (W + 2 * pad - 2) // 2, w.shape[3])
    winner = np.empty(y.shape, np.uint8)
    _run_forward(x, w, b, pad, relu, y, winner, NO_NUMBERS)
    return y, winner


def conv_norm_forward(x: Array, w: Array, pad: int, moments: Array) -> Array:
    """conv_forward without bias and ReLU; the statistics of y go to moments, see add_statistics of normalization.py."""
    y = _room_for_output(x, w, pad)
    _run_forward(x, w, np.zeros(w.shape[3], np.float32), pad, False, y, NO_WINNER, moments)
    return y


def _room_for_output(x: Array, w: Array, pad: int) -> Array:
    N, H, W, _ = x.shape
    return empty(N, H + 2 * pad - 2, W + 2 * pad - 2, w.shape[3])


def _run_forward(
    x: Array, w: Array, b: Array, pad: int, relu: bool, y: Array, winner: Array, moments: Array
) -> None:  # fmt: skip
    C, F = w.shape[2:]
    few, grid, blank, still = _plan(x.shape, F, pad)
    u, v, m, padded = (empty(*shape) for shape in (*_spaces(few, C, F), grid))
    padded[...] = 0
    floor, bend = np.float32(0.0 if relu else -np.inf), np.float32(0.0 if relu else np.nan)
    loops.filters(np.ascontiguousarray(w), u)
    x, rows = np.ascontiguousarray(x), rows_of(y)
    loops.forward(x, u, b, pad, floor, bend, few, v, m, padded, blank, still, y, winner, rows, moments)


def conv_backward(
    x: Array, y: Array, dy: Array, w: Array, stride: int, pad: int, relu: bool, dw: Array, db: Array, wants_dx: bool
) -> Array | None:
    """The adjoint of conv_forward: add to dw (3, 3, C, F) and db (F,), return dx (N, H, W, C) if it is wanted."""
    bend = np.float32(0.0 if relu else np.nan)
    return _run_backward(x, y, NO_WINNER, dy, w, pad, bend, dw, db, wants_dx)


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


def conv_norm_backward(
    x: Array, gradient: NormGradient, w: Array, pad: int, dw: Array, wants_dx: bool, onto: Array | None
) -> Array | None:
    """The adjoint of conv_norm_forward for a gradient that is computed as it is needed; dx is added to onto, if any."""
    y, dy, channels, floor = gradient
    db, onto = np.zeros(w.shape[3], np.float32), NO_IMAGES if onto is None else onto
    return _run_backward(x, y, NO_WINNER, dy, w, pad, floor, dw, db, wants_dx, channels, onto)


def _run_backward(
    x: Array, y: Array, winner: Array, dy: Array, w: Array, pad: int, bend: np.float32, dw: Array, db: Array,
    wants_dx: bool, channels: Array = NO_CHANNELS, onto: Array = NO_IMAGES
) -> Array | None:  # fmt: skip
    C, F = w.shape[2:]
    few, grid, blank, still = _plan(x.shape, F, pad)
    images = len(still) if channels.size else 0  # at hand, whose dy is to be computed
    turned, v, m, padded, sums, normed = (
        empty(*shape) for shape in (*_spaces(few, C, F), grid, grid, (images, *y.shape[1:]))
    )
    du = empty(*turned.shape)
    padded[...] = 0
    loops.filters(np.ascontiguousarray(w.transpose(0, 1, 3, 2)), turned)
    if not len(x):
        du[...] = 0  # else the first round overwrites it
    dx = empty(*(x.shape if wants_dx else (0, 0, 0, 0)))
    x, y, dy, onto = (np.ascontiguousarray(array, np.float32) for array in (x, y, dy, onto))
    loops.backward(
        x, y, winner, dy, turned, pad, bend, few, v, m, padded, blank, still, sums, du, db, dx, wants_dx, channels,
        rows_of(y), normed, onto
    )  # fmt: skip
    loops.filters_adjoint(du, dw)
    return dx if wants_dx else None


def _plan(shape: tuple[int, ...], F: int, pad: int) -> tuple[int, tuple[int, ...], Array, Array]:
    """How many tiles of x (N, H, W, C) to take at a time, and the shape of an image among zeros that holds all tiles.

    And room for which of its pixels are 0, and for which windows of the images at hand hold zeros alone.
    """
    N, H, W, C = shape
    down, across = (-(-(size + 2 * pad - 2) // TILE) for size in (H, W))
    tiles = N * down * across
    few = max(1, (TILES + 3 * max(0, 36 * C * F - FILTERS)) // (36 * (C + F)))
    few = -(-tiles // -(-tiles // few)) if N else 1  # as many rounds, but even ones: filters pass with a short one too
    few = -(-few // EVEN) * EVEN
    grid = TILE * down + PATCH - TILE, TILE * across + PATCH - TILE, C
    # 0 behind the image and its padding: windows there give no output, nor do those that go across the end of a row.
    blank = np.zeros((grid[0], grid[1] + 1), np.uint8)
    blank[: H + 2 * pad, : W + 2 * pad] = 1
    still = np.empty((few // (down * across) + 2, *blank.shape), np.uint8)  # of all images that a round may touch
    return few, grid, blank, still


def _spaces(few: int, C: int, F: int) -> list[tuple[int, int]]:
    """Shapes of filters and tiles, seen from both sides.

    An odd number of cache lines lies between the 36 elements of a tile, or they would fall into the same few places.
    """
    return [(36, size + LINE) for size in (C * F, few * C, few * F)]
