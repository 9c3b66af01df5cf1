"""Where the windows of a convolution hold nothing but zeros: there its output is the bias, to the bit.

A tile of Winograd's that holds other windows too leaves rounding errors there in place of 0, and ReLU would let the
gradient pass where they are positive: with the biases of the start, in half of the background of an image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.kernels.compiled import compiled
from distconv.kernels.cpu.tiles import TILE

Array = NDArray[Any]


@compiled
def zero_windows(blank: Array, still: Array) -> None:
    """still[h, w] = 1 where the 3 x 3 window of blank from (h, w) on holds ones alone; in the last corner, if any does.

    Windows go across the ends of rows here, as if all rows were one, so that the compiler takes 64 at a time. So the
    last column of blank must be 0.
    """
    width = blank.shape[1]
    windows = blank.size - 2 * width - 2
    line, out = blank.reshape(-1), still.reshape(-1)
    out[:windows] = 1
    for place in range(9):
        start = place // 3 * width + place % 3
        part = line[start : start + windows]
        for i in range(windows):
            out[i] &= part[i]
    found = np.uint8(0)
    for i in range(windows):
        found |= out[i]
    out[-1] = found


@compiled
def fill_zero_windows(still: Array, top: int, left: int, b: Array, floor: np.float32, y: Array) -> None:
    """Write max(b, floor) into the tile of y (OH, OW, F) from (top, left) on where its windows hold zeros alone."""
    OH, OW, F = y.shape
    for h in range(top, min(top + TILE, OH)):
        for w in range(left, min(left + TILE, OW)):
            if still[h, w]:
                for f in range(F):
                    y[h, w, f] = floor if b[f] < floor else b[f]
