"""What Winograd's minimal filtering F(4x4, 3x3) does to one tile, and the adjoints of it, on vectors of channels.

The functions under @emitted become instructions within the loops of winograd_loops.py; winograd.py has the formulas.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from distconv.kernels.cpu.vector import Bytes, Index, Pointer, Sum, Vector, emitted, scratch, zeros
from distconv.kernels.interface import SHUT

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


def _pixels(image: Pointer, W: Index, C: Index, size: int) -> list[list[Pointer]]:
    """Pointers to size x size pixels of an image (H, W, C)."""
    return [[image + (W * i + j) * C for j in range(size)] for i in range(size)]


def _places(image: Pointer, h: Index, w: Index, H: Index, W: Index, C: Index, size: int) -> list[list[Pointer]]:
    """Pointers to size x size pixels of an image (H, W, C) from (h, w) on; those outside it point to zeros."""
    outside = Pointer(image.builder, image.builder.bitcast(scratch(image.builder).value, image.value.type))
    rows, columns = [h + i for i in range(size)], [w + j for j in range(size)]
    return [
        [
            (image + (row * W + column) * C).where(image.builder.and_(row.within(H), column.within(W)), outside)
            for column in columns
        ]
        for row in rows
    ]


def _at_tile(
    h: Index, w: Index, H: Index, W: Index, C: Index, size: int, images: list[Pointer], body: Callable[..., None]
) -> None:
    """Emit body(pixels of a tile at (h, w) of each image) twice: for whole tiles, and for those that reach outside."""
    builder = h.builder
    whole = builder.and_((h + (size - 1)).within(H), (w + (size - 1)).within(W))
    with builder.if_else(whole, likely=True) as (then, otherwise):
        with then:
            body(*(_pixels(image + (h * W + w) * C, W, C, size) for image in images))
        with otherwise:
            body(*(_places(image, h, w, H, W, C, size) for image in images))


@emitted
def input_tile(
    builder: ir.IRBuilder, x: Pointer, at: Index, W: Index, C: Index, v: Pointer, to: Index, stride: Index
) -> None:
    """v[36] = B' x B for the patch from x[at] on, in an image (H, W, C) that holds all of it."""
    tile = [[place.load() for place in row] for row in _pixels(x + at, W, C, PATCH)]
    _store_all(_both_ways(_input, tile), v + to, stride)


@emitted
def output_tile(
    builder: ir.IRBuilder, m: Pointer, start: Index, stride: Index, b: Pointer, f: Index, floor: Vector,
    y: Pointer, image: Index, h: Index, w: Index, H: Index, W: Index, F: Index
) -> None:  # fmt: skip
    """y = max(A' m A + b, floor) for the tile at (h, w) of the image that begins at y[image]."""
    tile = _both_ways(_output, _load_all(m + start, stride))
    bias = (b + f).load()

    def store(places: list[list[Pointer]]) -> None:
        for row, row_places in zip(tile, places, strict=True):
            for value, place in zip(row, row_places, strict=True):
                place.store((value + bias).at_least(floor))

    _at_tile(h, w, H, W, F, TILE, [y + image], store)


@emitted
def output_tile_adjoint(
    builder: ir.IRBuilder, dy: Pointer, y: Pointer, floor: Vector, image: Index, h: Index, w: Index, H: Index,
    W: Index, F: Index, db: Pointer, f: Index, m: Pointer, to: Index, stride: Index
) -> None:  # fmt: skip
    """m[36] = A dy A', where dy counts only where y > floor (a floor of NaN: everywhere); db += the sum of dy."""
    zero = zeros(builder)

    def transform(gradients: list[list[Pointer]], values: list[list[Pointer]]) -> None:
        tile = [
            [at.load().where(value.load().above(floor), zero) for at, value in zip(*rows, strict=True)]
            for rows in zip(gradients, values, strict=True)
        ]
        _store_gradient(tile, db + f, m + to, stride)

    _at_tile(h, w, H, W, F, TILE, [dy + image, y + image], transform)


@emitted
def pooled_tile(
    builder: ir.IRBuilder, m: Pointer, start: Index, stride: Index, b: Pointer, f: Index, floor: Vector, bend: Vector,
    still: Pointer, window: Index, across: Index, looks: Index,
    y: Pointer, winner: Pointer, image: Index, h: Index, w: Index, H: Index, W: Index, F: Index
) -> None:  # fmt: skip
    """As output_tile, and then the largest of each 2 x 2 pixels: y, winner (H, W, F), of which a tile has 2 x 2.

    The bias where still[window + across * i + j] is 1, if one is to look. winner: which of the four; SHUT where not
    above the bend.
    """
    bias = (b + f).load()
    tile = [
        [Sum((value + bias).at_least(floor)) for value in row]
        for row in _both_ways(_output, _load_all(m + start, stride))
    ]
    with builder.if_then(builder.trunc(looks.value, ir.IntType(1)), likely=False):
        for i, row in enumerate(tile):
            for j, value in enumerate(row):
                byte = builder.load((still + window + across * i + j).value)
                zeros_alone = builder.icmp_unsigned("!=", byte, byte.type(0))
                value.set(bias.at_least(floor).where(zeros_alone, value.get()))

    def store(places: list[list[Pointer]], winners: list[list[Pointer]]) -> None:
        for i, j in itertools.product(range(2), repeat=2):
            best, which = tile[2 * i][2 * j].get(), Bytes.all(builder, 0)
            for k in range(1, 4):
                value = tile[2 * i + k // 2][2 * j + k % 2].get()
                larger = value.wins(best)
                best, which = value.where(larger, best), Bytes.all(builder, k).where(larger, which)
            places[i][j].store(best)
            which.where(best.above(bend), Bytes.all(builder, SHUT)).store(winners[i][j])

    _at_tile(h, w, H, W, F, 2, [y + image, winner + image], store)


@emitted
def pooled_tile_adjoint(
    builder: ir.IRBuilder, dy: Pointer, winner: Pointer, image: Index, h: Index, w: Index, H: Index, W: Index,
    F: Index, db: Pointer, f: Index, m: Pointer, to: Index, stride: Index
) -> None:  # fmt: skip
    """m[36] = A d A', where d (4, 4) has each dy at its winner; db += the sum of d."""
    zero = zeros(builder)

    def transform(gradients: list[list[Pointer]], winners: list[list[Pointer]]) -> None:
        tile = [[zero] * TILE for _ in range(TILE)]
        for i, j in itertools.product(range(2), repeat=2):
            gradient, which = gradients[i][j].load(), Bytes.load(winners[i][j])
            for k in range(4):
                tile[2 * i + k // 2][2 * j + k % 2] = gradient.where(which.equal(k), zero)
        _store_gradient(tile, db + f, m + to, stride)

    _at_tile(h, w, H, W, F, 2, [dy + image, winner + image], transform)


def _store_gradient(tile: list[list[Vector]], db: Pointer, m: Pointer, stride: Index) -> None:
    """m[36] = A tile A'; db += the sum of the tile, which is one of the 36."""
    transformed = _both_ways(_output_adjoint, tile)
    db.store(db.load() + transformed[1][1])
    _store_all(transformed, m, stride)


@emitted
def input_tile_adjoint(
    builder: ir.IRBuilder, v: Pointer, start: Index, stride: Index, dx: Pointer, at: Index, W: Index, C: Index
) -> None:
    """dx += B v B' for the patch from dx[at] on, in an image (H, W, C) that holds all of it."""
    tile = _both_ways(_input_adjoint, _load_all(v + start, stride))
    for row, places in zip(tile, _pixels(dx + at, W, C, PATCH), strict=True):
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
