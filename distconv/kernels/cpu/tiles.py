"""What Winograd's minimal filtering F(4x4, 3x3) does to one tile, and the adjoints of it, on vectors of channels.

The functions under @emitted become instructions within the loops of kernels/cpu/winograd.py, which has the formulas.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from distconv.kernels.cpu.vector import Index, Pointer, Vector, emitted, scratch, zeros

TILE, PATCH, FILTER = 4, 6, 3


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


def _filter(g: list[Vector]) -> list[Vector]:
    """G g: 3 -> 6."""
    s, e, o = g[0] + g[2], g[0].times(1 / 24, g[2] * (1 / 6)), g[1] * (1 / 12)
    return [g[0] * 0.25, (s + g[1]) * (-1 / 6), (s - g[1]) * (-1 / 6), e + o, e - o, g[2]]


def _filter_adjoint(u: list[Vector]) -> list[Vector]:
    """G' u: 6 -> 3."""
    s, d, t, e = u[1] + u[2], u[1] - u[2], u[3] + u[4], u[3] - u[4]
    return [
        u[0].times(1 / 4, s.times(-1 / 6, t * (1 / 24))),
        d.times(-1 / 6, e * (1 / 12)),
        s.times(-1 / 6, t.times(1 / 6, u[5])),
    ]


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


@emitted
def filter_tile(builder: ir.IRBuilder, w: Pointer, size: Index, at: Index, u: Pointer, stride: Index) -> None:
    """u (36, stride) = G w (9, size) G' for the LANES filters from column `at` on."""
    _store_all(_both_ways(_filter, _load_all(w + at, size, FILTER)), u + at, stride)


@emitted
def filter_tile_adjoint(builder: ir.IRBuilder, u: Pointer, stride: Index, at: Index, w: Pointer, size: Index) -> None:
    """w (9, size) += G' u (36, stride) G for the LANES filters from column `at` on."""
    total = _load_all(w + at, size, FILTER)
    for i, row in enumerate(_both_ways(_filter_adjoint, _load_all(u + at, stride))):
        for j, value in enumerate(row):
            total[i][j] = total[i][j] + value
    _store_all(total, w + at, size)


def _load_all(m: Pointer, stride: Index, size: int = PATCH) -> list[list[Vector]]:
    return [[(m + stride * (size * i + j)).load() for j in range(size)] for i in range(size)]


def _store_all(tile: list[list[Vector]], v: Pointer, stride: Index) -> None:
    for i, row in enumerate(tile):
        for j, value in enumerate(row):
            (v + stride * (len(row) * i + j)).store(value)
