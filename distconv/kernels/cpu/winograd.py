"""Convolution with 3 x 3 filters, stride 1, float32: a quarter of the multiplications.

Winograd's minimal filtering F(4x4, 3x3) as Lavin and Gray 2015 (arXiv 1509.09308) use it. An output tile of 4 x 4
pixels is y = A' [(G w G') * (B' x B)] A, where x is the input tile of 6 x 6, ' transposes, and * multiplies the 36
elements one by one; summed over channels, that is 36 matrix products. The gradients are the adjoints of these steps.
A few tiles pass through all steps at a time, so that what lies between them stays in a core's cache. Where products are
computed, memory has nothing to do; so what comes before and after them is asked for meanwhile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.kernels.compiled import compiled
from distconv.kernels.cpu.aligned import empty
from distconv.kernels.cpu.normalization import NormGradient, add_statistics, rows_of, write_gradient
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
from distconv.kernels.cpu.vector import LANES, LINE, prefetch, prefetch_to_write
from distconv.kernels.cpu.zero_windows import fill_zero_windows, zero_windows

Array = NDArray[Any]
# Floats of a core's second cache: for tiles, and for filters, which pass through it with every round. Larger filters
# come from further away, so that more tiles a round are better then.
TILES, FILTERS = 3 << 15, 1 << 18
NO_IMAGES, NO_NUMBERS = np.empty((0, 0, 0, 0), np.float32), np.empty((0, 0))
NO_WINNER = np.empty((0, 0, 0, 0), np.uint8)
NO_CHANNELS = np.empty((5, 0), np.float32)
AT_ONCE = 32  # rows of a product, between two requests for memory


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
    few, v, m, padded, blank, still = _room(x.shape, F, pad)
    u = empty(36, C * F + LINE)
    floor, bend = np.float32(0.0 if relu else -np.inf), np.float32(0.0 if relu else np.nan)
    _filters(np.ascontiguousarray(w), u)
    x, rows = np.ascontiguousarray(x), rows_of(y)
    _forward(x, u, b, pad, floor, bend, few, v, m, padded, blank, still, y, winner, rows, moments)


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
    few, v, m, padded, blank, still = _room(x.shape, F, pad)
    turned = empty(36, F * C + LINE)
    _filters(np.ascontiguousarray(w.transpose(0, 1, 3, 2)), turned)
    du = empty(36, C * F + LINE)
    if not len(x):
        du[...] = 0  # else the first round overwrites it
    dx, sums = empty(*(x.shape if wants_dx else (0, 0, 0, 0))), empty(*padded.shape)
    x, y, dy, onto = (np.ascontiguousarray(array) for array in (x, y, dy, onto))
    normed = empty(len(still), *y.shape[1:]) if channels.size else NO_IMAGES  # of the images at hand
    _backward(
        x, y, winner, dy, turned, pad, bend, few, v, m, padded, blank, still, sums, du, db, dx, wants_dx, channels,
        rows_of(y), normed, onto
    )  # fmt: skip
    _filters_adjoint(du, dw)
    return dx if wants_dx else None


def _room(shape: tuple[int, ...], F: int, pad: int) -> tuple[int, Array, Array, Array, Array, Array]:
    """How many tiles of x (N, H, W, C) to take at a time, and room for them, seen from both sides.

    And for an image among zeros, for which of its pixels are 0, and for which windows of the images at hand hold zeros
    alone.
    """
    N, H, W, C = shape
    down, across = (-(-(size + 2 * pad - 2) // TILE) for size in (H, W))
    tiles = N * down * across
    few = max(1, (TILES + 3 * max(0, 36 * C * F - FILTERS)) // (36 * (C + F)))
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
        if h == 0 and w == 0:  # else the image is here since the last round
            copy_in(x, n, pad, padded, blank)
            zero_windows(blank, still[n % len(still)])
        for c in range(0, C, LANES):
            input_tile(padded, TILE * (h * PW + w) * C + c, PW, C, v, t * C + c, stride)
        n, h, w = _next(n, h, w, down, across)


@compiled
def _inputs_adjoint(
    v: Array, first: int, tiles: int, pad: int, sums: Array, blank: Array, onto: Array, dx: Array
) -> None:  # fmt: skip
    PH, PW, C = sums.shape
    down, across = PH // TILE, PW // TILE
    stride = v.shape[1]
    n, h, w = _place(first, down, across)
    for t in range(tiles):
        if h == 0 and w == 0:
            sums[...] = 0
            if onto.size:
                copy_in(onto, n, pad, sums, blank)
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
        image = n % len(dy) * OH * OW * F
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
def _part(x: Array, first: int, tiles: int, all_tiles: int, parts: int) -> tuple[int, int]:
    """Where tiles of x (N, H, W, C) begin, and how many cache lines each of so many parts of them has, or none."""
    start, stop = first * x.size // all_tiles, min(first + tiles, all_tiles) * x.size // all_tiles
    return start, -((start - stop) // (parts * LINE))


@compiled
def _forward(
    x: Array, u: Array, b: Array, pad: int, floor: np.float32, bend: np.float32, few: int, v: Array, m: Array,
    padded: Array, blank: Array, still: Array, y: Array, winner: Array, pixels_at_once: int, moments: Array
) -> None:  # fmt: skip
    PH, PW, C = padded.shape
    N, F = y.shape[0], y.shape[3]
    image, size = (PH // TILE) * (PW // TILE), y.shape[1] * y.shape[2]
    u_stride, v_stride, m_stride = u.shape[1], v.shape[1], m.shape[1]
    for first in range(0, N * image, few):
        tiles = min(few, N * image - first)
        rows = (tiles + ROWS - 1) // ROWS * ROWS
        _inputs(x, first, tiles, pad, padded, blank, still, v)
        parts = 36 * ((rows + AT_ONCE - 1) // AT_ONCE)
        x_at, x_lines = _part(x, first + tiles, tiles, N * image, parts)
        y_at, y_lines = _part(y, first, tiles, N * image, parts)
        for p in range(36):
            for row in range(0, rows, AT_ONCE):
                prefetch(x, x_at, x_lines)
                prefetch_to_write(y, y_at, y_lines)
                x_at, y_at = x_at + x_lines * LINE, y_at + y_lines * LINE
                v_at, m_at, some = p * v_stride + row * C, p * m_stride + row * F, min(AT_ONCE, rows - row)
                product(v, v_at, C, 1, u, p * u_stride, F, m, m_at, F, some, F, C, 0)
        _outputs(m, first, tiles, b, floor, bend, still, y, winner)
        if moments.size:  # of the images that are whole now
            whole, stop = first // image, (first + tiles) // image
            add_statistics(y, whole * size, stop * size, pixels_at_once, moments)


@compiled
def _backward(
    x: Array, y: Array, winner: Array, dy: Array, ut: Array, pad: int, bend: np.float32, few: int, v: Array, m: Array,
    padded: Array, blank: Array, still: Array, sums: Array, du: Array, db: Array, dx: Array, wants_dx: bool,
    channels: Array, pixels_at_once: int, normed: Array, onto: Array
) -> None:  # fmt: skip
    PH, PW, C = padded.shape
    N, F = dy.shape[0], dy.shape[3]
    u_stride, v_stride, m_stride = ut.shape[1], v.shape[1], m.shape[1]
    down, across = PH // TILE, PW // TILE
    image, size = down * across, dy.shape[1] * dy.shape[2]
    reads_y = normed.size > 0 or not np.isnan(bend)
    for first in range(0, N * image, few):
        tiles = min(few, N * image - first)
        rows = (tiles + ROWS - 1) // ROWS * ROWS
        _inputs(x, first, tiles, pad, padded, blank, still, v)
        if normed.size:
            for n in range((first + image - 1) // image, (first + tiles + image - 1) // image):  # that begin here
                place = normed[n % len(normed)]
                write_gradient(y, dy, channels, bend, n * size, (n + 1) * size, pixels_at_once, place)
            everywhere = np.float32(np.nan)
            _outputs_adjoint(normed, normed, winner, first, tiles, down, across, everywhere, db, m)
        else:
            _outputs_adjoint(dy, y, winner, first, tiles, down, across, bend, db, m)
        parts = 36 * ((rows + AT_ONCE - 1) // AT_ONCE)
        x_at, x_lines = _part(x, first + tiles, tiles, N * image, parts)
        dy_at, dy_lines = _part(dy, first + tiles, tiles, N * image, parts)
        dx_at, dx_lines = _part(dx, first, tiles, N * image, parts)
        for p in range(36):
            product(v, p * v_stride, 1, C, m, p * m_stride, F, du, p * u_stride, F, C, F, tiles, first > 0)
            for row in range(0, rows, AT_ONCE):
                prefetch(x, x_at, x_lines)
                prefetch(dy, dy_at, dy_lines)
                if reads_y:
                    prefetch(y, dy_at, dy_lines)
                if onto.size:
                    prefetch(onto, dx_at, dx_lines)
                prefetch_to_write(dx, dx_at, dx_lines)
                x_at, dy_at, dx_at = x_at + x_lines * LINE, dy_at + dy_lines * LINE, dx_at + dx_lines * LINE
                if wants_dx:
                    v_at, m_at, some = p * v_stride + row * C, p * m_stride + row * F, min(AT_ONCE, rows - row)
                    product(m, m_at, F, 1, ut, p * u_stride, C, v, v_at, C, some, C, F, 0)
        if wants_dx:
            _inputs_adjoint(v, first, tiles, pad, sums, blank, onto, dx)
