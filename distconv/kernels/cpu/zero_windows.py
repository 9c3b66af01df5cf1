"""Where the windows of a convolution hold nothing but zeros: there its output is the bias, to the bit.

A tile of Winograd's that holds other windows too leaves rounding errors there in place of 0, and ReLU would let the
gradient pass where they are positive: with the biases of the start, in half of the background of an image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from distconv.kernels.compiled import compiled
from distconv.kernels.cpu.vector import LANES, Index, Pointer, emitted, repeat, zeros

Array = NDArray[Any]


@emitted
def row_of_zeros(
    builder: ir.IRBuilder, x: Pointer, at: Index, W: Index, vectors: Index, blank: Pointer, to: Index
) -> None:
    """blank[to + w] = 1 where all channels of the pixel w of the row x[at] are 0, else 0; `vectors` of them a pixel."""
    mask = ir.IntType(LANES)
    found = builder.alloca(mask)
    with repeat(W) as column:
        builder.store(mask(0), found)
        with repeat(vectors) as part:
            numbers = (x + at + (column * vectors + part) * LANES).load()
            others = builder.bitcast(builder.fcmp_unordered("!=", numbers.value, zeros(builder).value), mask)
            builder.store(builder.or_(builder.load(found), others), found)
        zero = builder.icmp_unsigned("==", builder.load(found), mask(0))
        builder.store(builder.zext(zero, ir.IntType(8)), (blank + to + column).value)


@compiled
def fill_zero_windows(x: Array, b: Array, pad: int, floor: np.float32, y: Array) -> None:
    """Write max(b, floor) into y (N, OH, OW, F) where the 3 x 3 window of x (N, H, W, C) holds zeros alone."""
    N, H, W, C = x.shape
    _, OH, OW, F = y.shape
    width = W + 2 * pad
    blank = np.ones((H + 2 * pad) * width, np.uint8)  # the padding is
    for n in range(N):
        for h in range(H):
            row_of_zeros(x, (n * H + h) * W * C, W, C // LANES, blank, (h + pad) * width + pad)
        for h in range(OH):
            for w in range(OW):
                at = h * width + w
                if blank[at + width + 1] and blank[at] and blank[at + 2 * width + 2]:
                    all_of_them = 1
                    for row in range(at, at + 3 * width, width):
                        all_of_them &= blank[row] & blank[row + 1] & blank[row + 2]
                    if all_of_them:
                        for f in range(F):
                            y[n, h, w, f] = floor if b[f] < floor else b[f]
