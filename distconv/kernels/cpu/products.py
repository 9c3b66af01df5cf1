"""Matrix products whose sums stay in registers, float32; each sum in the order of its terms, on any processor."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from distconv.kernels.compiled import compiled
from distconv.kernels.cpu.vector import LANES, Index, Pointer, Sum, emitted_with, repeat, zeros

Array = NDArray[Any]
# A block of sums is ROWS x 2 vectors: 8 x 2 of the 32 registers of AVX-512, 4 x 2 of the 16 of AVX2. The latter are
# just enough to keep two units busy with sums that take four cycles each; and ROWS must divide 16, as channels do.
ROWS = 8 if LANES == 16 else 4


def _product_block(
    vectors: int, builder: ir.IRBuilder, a: Pointer, a_at: Index, a_row: Index, a_step: Index, b: Pointer, b_at: Index,
    b_step: Index, depth: Index, c: Pointer, c_at: Index, c_row: Index, keep: Index
) -> None:  # fmt: skip
    """c (ROWS, vectors * LANES) = keep * c + a (ROWS, depth) @ b (depth, vectors * LANES), the sums in registers.

    a[i, k] lies at a_at + a_row * i + a_step * k, b[k] at b_at + b_step * k, c[i] at c_at + c_row * i.
    """
    a, b, c = a + a_at, b + b_at, c + c_at
    places = [[c + c_row * i + LANES * j for j in range(vectors)] for i in range(ROWS)]
    sums = [[Sum(zeros(builder)) for _ in row] for row in places]
    with builder.if_then(builder.trunc(keep.value, ir.IntType(1))):
        for row, sum_row in zip(places, sums, strict=True):
            for place, total in zip(row, sum_row, strict=True):
                total.set(place.load())
    with repeat(depth) as k:
        across = [(b + b_step * k + LANES * j).load() for j in range(vectors)]
        for i, sum_row in enumerate(sums):
            down = (a + a_row * i + a_step * k).spread()
            for value, total in zip(across, sum_row, strict=True):
                total.set(down.times(value, total.get()))
    for row, sum_row in zip(places, sums, strict=True):
        for place, total in zip(row, sum_row, strict=True):
            place.store(total.get())


product_block_1, product_block_2 = (emitted_with(vectors, _product_block) for vectors in (1, 2))


@compiled
def product(
    a: Array, a_at: int, a_row: int, a_step: int, b: Array, b_at: int, b_step: int, c: Array, c_at: int, c_row: int,
    rows: int, columns: int, depth: int, keep: int
) -> None:  # fmt: skip
    """c (rows, columns) = keep * c + a @ b; rows a multiple of ROWS, columns of LANES.

    The rows of b and of c lie side by side.
    """
    wide = columns // (2 * LANES) * (2 * LANES)
    for j in range(0, wide, 2 * LANES):
        for i in range(0, rows, ROWS):
            product_block_2(
                a, a_at + i * a_row, a_row, a_step, b, b_at + j, b_step, depth, c, c_at + i * c_row + j, c_row, keep
            )
    if wide < columns:
        for i in range(0, rows, ROWS):
            product_block_1(
                a,
                a_at + i * a_row,
                a_row,
                a_step,
                b,
                b_at + wide,
                b_step,
                depth,
                c,
                c_at + i * c_row + wide,
                c_row,
                keep,
            )


def matmul(a: Array, b: Array) -> Array:
    """a (M, K) @ b (K, N) -> (M, N), float32.

    A BLAS adds up in an order that hangs on the processor, on its threads, and on M and N.
    """
    a, b = (np.asarray(array, np.float32) for array in (a, b))
    (M, K), N = a.shape, b.shape[1]
    down, across = -(-M // ROWS) * ROWS, -(-N // LANES) * LANES
    if down > M:
        a = np.concatenate([a, np.zeros((down - M, K), np.float32)])
    if across > N or not b.flags.c_contiguous:
        wide = np.zeros((K, across), np.float32)
        wide[:, :N] = b
        b = wide
    if not (a.flags.c_contiguous or a.flags.f_contiguous):
        a = np.ascontiguousarray(a)
    c = np.empty((down, across), np.float32)
    row, step = (stride // a.itemsize for stride in a.strides)
    product(
        a.reshape(-1, order="A"), 0, row, step, b.reshape(-1), 0, across, c.reshape(-1), 0, across, down, across, K, 0
    )
    return c[:M, :N]
