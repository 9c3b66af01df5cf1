"""The compiled loops of kernels/cpu/winograd.py: the steps of a round of tiles, one after the other.

While products are computed, memory has nothing to do. So what the next round reads and what this one is to write is
asked for meanwhile, a few cache lines for each block of a product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.kernels.compiled import compiled
from distconv.kernels.cpu.normalization import add_statistics, write_gradient
from distconv.kernels.cpu.padded import copy_in, copy_out
from distconv.kernels.cpu.products import ROWS, product
from distconv.kernels.cpu.tiles import (
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
BLOCK_ROWS, BLOCK_COLUMNS = 32, 2 * LANES  # of a product, between two requests for memory


@compiled
def filters(w: Array, u: Array) -> None:
    """u (36, C * F and more) = G w G' of all filters w (3, 3, C, F)."""
    size = w.size // 9
    for at in range(0, size, LANES):
        filter_tile(w, size, at, u, u.shape[1])


@compiled
def filters_adjoint(du: Array, dw: Array) -> None:
    """Add G' du G to dw."""
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
def _blocks(rows: int, columns: int) -> int:
    """Into how many blocks a product of this size falls."""
    return ((rows + BLOCK_ROWS - 1) // BLOCK_ROWS) * ((columns + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS)


@compiled
def _share(x: Array, first: int, tiles: int, all_tiles: int, blocks: int) -> tuple[int, int]:
    """Where tiles of x (N, H, W, C) begin, and how many of their cache lines to ask for at each block, or none."""
    start, stop = first * x.size // all_tiles, min(first + tiles, all_tiles) * x.size // all_tiles
    return start, -((start - stop) // (blocks * LINE))


@compiled
def forward(
    x: Array, u: Array, b: Array, pad: int, floor: np.float32, bend: np.float32, few: int, v: Array, m: Array,
    padded: Array, blank: Array, still: Array, y: Array, winner: Array, pixels_at_once: int, moments: Array
) -> None:  # fmt: skip
    """y from x and the filters u, `few` tiles a round; if there are moments, they get the statistics of y."""
    PH, PW, C = padded.shape
    N, F = y.shape[0], y.shape[3]
    image, size = (PH // TILE) * (PW // TILE), y.shape[1] * y.shape[2]
    u_stride, v_stride, m_stride = u.shape[1], v.shape[1], m.shape[1]
    for first in range(0, N * image, few):
        tiles = min(few, N * image - first)
        rows = (tiles + ROWS - 1) // ROWS * ROWS
        _inputs(x, first, tiles, pad, padded, blank, still, v)
        blocks = 36 * _blocks(rows, F)
        x_at, x_lines = _share(x, first + tiles, tiles, N * image, blocks)
        y_at, y_lines = _share(y, first, tiles, N * image, blocks)
        for p in range(36):
            for f in range(0, F, BLOCK_COLUMNS):
                for row in range(0, rows, BLOCK_ROWS):
                    prefetch(x, x_at, x_lines)
                    prefetch_to_write(y, y_at, y_lines)
                    x_at, y_at = x_at + x_lines * LINE, y_at + y_lines * LINE
                    v_at, u_at, m_at = p * v_stride + row * C, p * u_stride + f, p * m_stride + row * F + f
                    some, columns = min(BLOCK_ROWS, rows - row), min(BLOCK_COLUMNS, F - f)
                    product(v, v_at, C, 1, u, u_at, F, m, m_at, F, some, columns, C, 0)
        _outputs(m, first, tiles, b, floor, bend, still, y, winner)
        if moments.size:  # of the images that are whole now
            whole, stop = first // image, (first + tiles) // image
            add_statistics(y, whole * size, stop * size, pixels_at_once, moments)


@compiled
def backward(
    x: Array, y: Array, winner: Array, dy: Array, ut: Array, pad: int, bend: np.float32, few: int, v: Array, m: Array,
    padded: Array, blank: Array, still: Array, sums: Array, du: Array, db: Array, dx: Array, wants_dx: bool,
    channels: Array, pixels_at_once: int, normed: Array, onto: Array
) -> None:  # fmt: skip
    """dx, added to onto if there is one, and du, from x and the turned filters ut, `few` tiles a round.

    Where there is room for normed (images at hand, OH, OW, F), the gradient of y is that of its normalisation, of which
    dy is the gradient: see NormGradient in normalization.py, whose floor the bend is then.
    """
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
            everywhere = np.float32(np.nan)
            for n in range((first + image - 1) // image, (first + tiles + image - 1) // image):  # that begin here
                place = normed[n % len(normed)]
                write_gradient(y, dy, channels, bend, n * size, (n + 1) * size, pixels_at_once, place)
            _outputs_adjoint(normed, normed, winner, first, tiles, down, across, everywhere, db, m)
        else:
            _outputs_adjoint(dy, y, winner, first, tiles, down, across, bend, db, m)
        blocks = 36 * _blocks(rows, C)
        x_at, x_lines = _share(x, first + tiles, tiles, N * image, blocks)
        dy_at, dy_lines = _share(dy, first + tiles, tiles, N * image, blocks)
        dx_at, dx_lines = _share(dx, first, tiles, N * image, blocks)
        for p in range(36):
            product(v, p * v_stride, 1, C, m, p * m_stride, F, du, p * u_stride, F, C, F, tiles, first > 0)
            for c in range(0, C, BLOCK_COLUMNS):
                for row in range(0, rows, BLOCK_ROWS):
                    prefetch(x, x_at, x_lines)
                    prefetch(dy, dy_at, dy_lines)
                    if reads_y:
                        prefetch(y, dy_at, dy_lines)
                    if onto.size:
                        prefetch(onto, dx_at, dx_lines)
                    prefetch_to_write(dx, dx_at, dx_lines)
                    x_at, dy_at, dx_at = x_at + x_lines * LINE, dy_at + dy_lines * LINE, dx_at + dx_lines * LINE
                    if wants_dx:
                        m_at, u_at, v_at = p * m_stride + row * F, p * u_stride + c, p * v_stride + row * C + c
                        some, columns = min(BLOCK_ROWS, rows - row), min(BLOCK_COLUMNS, C - c)
                        product(m, m_at, F, 1, ut, u_at, C, v, v_at, C, some, columns, F, 0)
        if wants_dx:
            _inputs_adjoint(v, first, tiles, pad, sums, blank, onto, dx)
