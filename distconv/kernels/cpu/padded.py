"""A copy of an image among zeros, which stays in a cache: there, no tile has to ask where the image ends."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numpy.typing import NDArray

from distconv.kernels.compiled import compiled
from distconv.kernels.cpu.vector import LANES, Index, Pointer, emitted, repeat, zeros

Array = NDArray[Any]


@emitted
def row_in(
    builder: ir.IRBuilder, x: Pointer, at: Index, W: Index, vectors: Index, padded: Pointer, to: Index,
    blank: Pointer, blank_at: Index
) -> None:  # fmt: skip
    """Copy a row of W pixels, `vectors` of them each; blank[blank_at + w] = 1 where all of pixel w is 0, else 0."""
    mask = ir.IntType(LANES)
    found = cgutils.alloca_once(builder, mask)  # a register
    with repeat(W) as column:
        builder.store(mask(0), found)
        with repeat(vectors) as part:
            place = (column * vectors + part) * LANES
            numbers = (x + at + place).load()
            (padded + to + place).store(numbers)
            others = builder.bitcast(builder.fcmp_unordered("!=", numbers.value, zeros(builder).value), mask)
            builder.store(builder.or_(builder.load(found), others), found)
        zero = builder.icmp_unsigned("==", builder.load(found), mask(0))
        builder.store(builder.zext(zero, ir.IntType(8)), (blank + blank_at + column).value)


@emitted
def row_out(builder: ir.IRBuilder, padded: Pointer, at: Index, vectors: Index, x: Pointer, to: Index) -> None:
    """Copy so many vectors."""
    with repeat(vectors) as part:
        (x + to + part * LANES).store((padded + at + part * LANES).load())


@compiled
def copy_in(x: Array, n: int, pad: int, padded: Array, blank: Array) -> None:
    """Image n of x (N, H, W, C) into the middle of padded (PH, PW, C), and which pixels are 0 into that of blank.

    The margins, left and above `pad` wide, must be there.
    """
    _, H, W, C = x.shape
    for h in range(pad, H + pad):
        to = (h * padded.shape[1] + pad) * C
        row_in(x, (n * H + h - pad) * W * C, W, C // LANES, padded, to, blank, h * blank.shape[1] + pad)


@compiled
def copy_out(padded: Array, pad: int, x: Array, n: int) -> None:
    """The middle of padded (PH, PW, C) to image n of x (N, H, W, C)."""
    _, H, W, C = x.shape
    PW = padded.shape[1]
    for h in range(H):
        row_out(padded, ((h + pad) * PW + pad) * C, W * (C // LANES), x, (n * H + h) * W * C)
