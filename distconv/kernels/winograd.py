"""Convolution with 3 x 3 filters, stride 1, float32: a quarter of the multiplications.

Winograd's minimal filtering F(4x4, 3x3) as Lavin and Gray 2015 (arXiv 1509.09308) use it. An output tile of 4 x 4
pixels is y = A' [(G w G') * (B' x B)] A, where x is the input tile of 6 x 6, ' transposes, and * multiplies the 36
elements one by one; summed over channels, that is 36 matrix products. The gradients are the adjoints of these steps.
A few images pass through all steps at a time, so that what lies between them stays in a core's cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from distconv.kernels.compiled import compiled
from distconv.kernels.products import ROWS, product
from distconv.kernels.still import fill_still
from distconv.kernels.vector import LANES, Index, Pointer, Vector, emitted, scratch, zeros

Array = NDArray[Any]
TILE, PATCH = 4, 6
LINE = 16  # floats of a cache line
CACHE = 1 << 17  # floats: half of a core's L2 cache to fill with tiles; 2^14 to 2^18 measured within 2 %
G = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
GG = np.kron(G, G).astype(np.float32)  # (36, 9): both directions at once


ONLY_FILTERS = False  # conv_backward knows dx too


def conv_forward(x: Array, w: Array, b: Array, pad: int, relu: bool) -> Array:
    """Convolution, bias and, if asked, ReLU: x (N, H, W, C), w (3, 3, C, F), b (F,) -> y (N, OH, OW, F), all float32.

    C and F are multiples of 16.
    """
    (N, H, W, C), F = x.shape, w.shape[3]
    y = np.empty((N, H + 2 * pad - 2, W + 2 * pad - 2, F), np.float32)
    few, v, m = _room(y.shape, C)
    u = GG @ w.reshape(9, C * F)
    floor, x = np.float32(0.0 if relu else -np.inf), np.ascontiguousarray(x)
    _forward(x, u, b, pad, floor, few, v, m, y)
    return y


def conv_backward(
    x: Array, y: Array, dy: Array, w: Array, pad: int, relu: bool, dw: Array, db: Array, wants_dx: bool
) -> Array | None:
    """The adjoint of conv_forward: write dw (3, 3, C, F) and db (F,), return dx (N, H, W, C) if it is wanted."""
    C, F = w.shape[2:]
    few, v, m = _room(y.shape, C)
    turned = GG @ w.reshape(9, C, F).transpose(0, 2, 1).reshape(9, F * C)  # turned while it is small
    du = (np.empty if len(x) else np.zeros)((36, C * F), np.float32)  # the first round overwrites it
    db[...] = 0
    dx = np.empty(x.shape if wants_dx else (0, 0, 0, 0), np.float32)
    floor = np.float32(0.0 if relu else np.nan)
    x, y, dy = (np.ascontiguousarray(array) for array in (x, y, dy))
    _backward(x, y, dy, turned, pad, floor, few, v, m, du, db, dx, wants_dx)
    np.matmul(GG.T, du, out=dw.reshape(9, C * F))
    return dx if wants_dx else None


def _room(shape: tuple[int, ...], C: int) -> tuple[int, Array, Array]:
    """How many images to take at a time for outputs (N, OH, OW, F), and room for their tiles, seen from both sides.

    All filters pass through the cache with every round, so large filters call for more images a round.
    """
    N, OH, OW, F = shape
    tiles = -(-OH // TILE) * -(-OW // TILE)
    few = max(1, (CACHE + 2 * 36 * C * F) // (36 * tiles * (C + F)))
    few = -(-N // -(-N // few)) if N else 1  # rounds of one length: a last short one would cost as much
    rows = -(-few * tiles // ROWS) * ROWS
    # An odd number of cache lines between the 36 elements of a tile, or they would all fall into the same few places.
    return few, np.empty((36, rows * C + LINE), np.float32), np.empty((36, rows * F + LINE), np.float32)


def _input(d: list[Vector]) -> list[Vector]:
    """B' d: 6 -> 6."""
    a, b = d[2].times(-4.0, d[4]), d[1].times(-4.0, d[3])
    c, e = d[4] - d[2], d[3] - d[1]
    return [
        d[0].times(4.0, d[2].times(-5.0, d[4])),
        a + b,
        a - b,
        e.times(2.0, c),
        e.times(-2.0, c),
        d[1].times(4.0, d[3].times(-5.0, d[5])),
    ]


def _input_adjoint(v: list[Vector]) -> list[Vector]:
    """B v: 6 -> 6."""
    s, d, t, e = v[1] + v[2], v[1] - v[2], v[3] + v[4], v[3] - v[4]
    return [
        v[0] * 4.0,
        v[5].times(4.0, e.times(-2.0, d * -4.0)),
        v[0].times(-5.0, s.times(-4.0, t * -1.0)),
        v[5].times(-5.0, e.times(2.0, d)),
        v[0] + s + t,
        v[5],
    ]


def _output(m: list[Vector]) -> list[Vector]:
    """A' m: 6 -> 4."""
    s, d, t, e = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    return [m[0] + s + t, e.times(2.0, d), t.times(4.0, s), e.times(8.0, d + m[5])]


def _output_adjoint(y: list[Vector]) -> list[Vector]:
    """A y: 4 -> 6."""
    s, d = y[0] + y[2], y[1] + y[3]
    t, e = y[2].times(4.0, y[0]), y[3].times(4.0, y[1])
    return [y[0], s + d, s - d, e.times(2.0, t), e.times(-2.0, t), y[3]]


def _both_ways(transform: Any, tile: list[list[Vector]]) -> list[list[Vector]]:
    """The transform of all columns, then of all rows; a tile is a list of rows."""
    columns = [transform(list(column)) for column in zip(*tile, strict=True)]
    return [transform(list(row)) for row in zip(*columns, strict=True)]


def _places(
    image: Pointer, h: Index, w: Index, H: Index, W: Index, C: Index, size: int, outside: Pointer
) -> list[list[Pointer]]:
    """Pointers to size x size pixels of an image (H, W, C) from (h, w) on; those outside the image point elsewhere."""
    rows, columns = [h + i for i in range(size)], [w + j for j in range(size)]
    return [
        [
            (image + (row * W + column) * C).where(image.builder.and_(row.within(H), column.within(W)), outside)
            for column in columns
        ]
        for row in rows
    ]


@emitted
def input_tile(
    builder: ir.IRBuilder, x: Pointer, image: Index, h: Index, w: Index, H: Index, W: Index, C: Index,
    v: Pointer, to: Index, stride: Index
) -> None:  # fmt: skip
    """v[36] = B' x B for the patch at (h, w) of the image that begins at x[image]; zero outside the image."""
    outside = scratch(builder)
    tile = [[place.load() for place in row] for row in _places(x + image, h, w, H, W, C, PATCH, outside)]
    _store_all(_both_ways(_input, tile), v + to, stride)


@emitted
def output_tile(
    builder: ir.IRBuilder, m: Pointer, start: Index, stride: Index, b: Pointer, f: Index, floor: Vector,
    y: Pointer, image: Index, h: Index, w: Index, H: Index, W: Index, F: Index
) -> None:  # fmt: skip
    """y = max(A' m A + b, floor) for the tile at (h, w) of the image that begins at y[image]."""
    tile = _both_ways(_output, _load_all(m + start, stride))
    bias = (b + f).load()
    for row, places in zip(tile, _places(y + image, h, w, H, W, F, TILE, scratch(builder)), strict=True):
        for value, place in zip(row, places, strict=True):
            place.store((value + bias).at_least(floor))


@emitted
def output_tile_adjoint(
    builder: ir.IRBuilder, dy: Pointer, y: Pointer, floor: Vector, image: Index, h: Index, w: Index, H: Index,
    W: Index, F: Index, db: Pointer, f: Index, m: Pointer, to: Index, stride: Index
) -> None:  # fmt: skip
    """m[36] = A dy A', where dy counts only where y > floor (a floor of NaN: everywhere); db += the sum of dy."""
    outside = scratch(builder)
    gradients = _places(dy + image, h, w, H, W, F, TILE, outside)
    values = _places(y + image, h, w, H, W, F, TILE, outside)
    zero = zeros(builder)
    tile = [
        [at.load().where(value.load().above(floor), zero) for at, value in zip(*rows, strict=True)]
        for rows in zip(gradients, values, strict=True)
    ]
    total = (db + f).load()
    for row in tile:
        total = total + ((row[0] + row[1]) + (row[2] + row[3]))
    (db + f).store(total)
    _store_all(_both_ways(_output_adjoint, tile), m + to, stride)


@emitted
def input_tile_adjoint(
    builder: ir.IRBuilder, v: Pointer, start: Index, stride: Index,
    dx: Pointer, image: Index, h: Index, w: Index, H: Index, W: Index, C: Index
) -> None:  # fmt: skip
    """dx += B v B' for the patch at (h, w) of the image that begins at dx[image]."""
    tile = _both_ways(_input_adjoint, _load_all(v + start, stride))
    for row, places in zip(tile, _places(dx + image, h, w, H, W, C, PATCH, scratch(builder)), strict=True):
        for value, place in zip(row, places, strict=True):
            place.store(place.load() + value)


def _load_all(m: Pointer, stride: Index) -> list[list[Vector]]:
    return [[(m + stride * (PATCH * i + j)).load() for j in range(PATCH)] for i in range(PATCH)]


def _store_all(tile: list[list[Vector]], v: Pointer, stride: Index) -> None:
    for i, row in enumerate(tile):
        for j, value in enumerate(row):
            (v + stride * (PATCH * i + j)).store(value)


@compiled
def _inputs(x: Array, first: int, images: int, pad: int, across: int, down: int, v: Array, stride: int) -> None:
    _, H, W, C = x.shape
    t = 0
    for n in range(first, first + images):
        for i in range(down):
            for j in range(across):
                for c in range(0, C, LANES):
                    input_tile(x, n * H * W * C + c, 4 * i - pad, 4 * j - pad, H, W, C, v, t * C + c, stride)
                t += 1


@compiled
def _forward(x: Array, u: Array, b: Array, pad: int, floor: np.float32, few: int, v: Array, m: Array, y: Array) -> None:
    N, C = x.shape[0], x.shape[3]
    _, OH, OW, F = y.shape
    down, across = (OH + 3) // 4, (OW + 3) // 4
    v_stride, m_stride = v.shape[1], m.shape[1]
    for first in range(0, N, few):
        images = min(few, N - first)
        tiles = images * down * across
        _inputs(x, first, images, pad, across, down, v, v_stride)
        for p in range(36):
            product(
                v, p * v_stride, C, 1, u, p * C * F, F, m, p * m_stride, F, (tiles + ROWS - 1) // ROWS * ROWS, F, C, 0
            )
        t = 0
        for n in range(first, first + images):
            for i in range(down):
                for j in range(across):
                    for f in range(0, F, LANES):
                        output_tile(
                            m, t * F + f, m_stride, b, f, floor, y, n * OH * OW * F + f, 4 * i, 4 * j, OH, OW, F
                        )
                    t += 1
        fill_still(x[first : first + images], b, pad, floor, y[first : first + images])  # while they are in the cache


@compiled
def _backward(
    x: Array, y: Array, dy: Array, ut: Array, pad: int, floor: np.float32, few: int, v: Array, m: Array, du: Array,
    db: Array, dx: Array, wants_dx: bool
) -> None:  # fmt: skip
    N, H, W, C = x.shape
    _, OH, OW, F = dy.shape
    down, across = (OH + 3) // 4, (OW + 3) // 4
    v_stride, m_stride = v.shape[1], m.shape[1]
    for first in range(0, N, few):
        images = min(few, N - first)
        tiles = images * down * across
        _inputs(x, first, images, pad, across, down, v, v_stride)
        t = 0
        for n in range(first, first + images):
            for i in range(down):
                for j in range(across):
                    for f in range(0, F, LANES):
                        output_tile_adjoint(
                            dy, y, floor, n * OH * OW * F + f, 4 * i, 4 * j, OH, OW, F, db, f, m, t * F + f, m_stride
                        )
                    t += 1
        for p in range(36):
            product(v, p * v_stride, 1, C, m, p * m_stride, F, du, p * C * F, F, C, F, tiles, first > 0)
            if wants_dx:
                product(
                    m,
                    p * m_stride,
                    F,
                    1,
                    ut,
                    p * C * F,
                    C,
                    v,
                    p * v_stride,
                    C,
                    (tiles + ROWS - 1) // ROWS * ROWS,
                    C,
                    F,
                    0,
                )
        if not wants_dx:
            continue
        dx[first : first + images] = 0
        t = 0
        for n in range(first, first + images):
            for i in range(down):
                for j in range(across):
                    for c in range(0, C, LANES):
                        input_tile_adjoint(
                            v, t * C + c, v_stride, dx, n * H * W * C + c, 4 * i - pad, 4 * j - pad, H, W, C
                        )
                    t += 1
