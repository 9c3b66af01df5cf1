"""Sums that do not hang on their order: numbers rounded to whole multiples of a step that all contributors share.

Whole numbers add up exactly. So the sum of V vectors has the same bits however they are dealt out to ranks, and in
whatever order they meet. The step of a block of BLOCK numbers comes from the largest of all vectors in it, which is so
small that V numbers of that size fill the range of the whole numbers on the wire: 16 or 32 bits.

The largest travels as the upper half of a float32, rounded up. It orders as a whole number does, NaN and infinity above
all others, among which numbers from 2^128 - 2^120 count.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distconv.kernels.compiled import compiled
from distconv.kernels.half import INFINITE, MANTISSA, from_bits, peak_bits
from distconv.kernels.interface import BLOCK

UPPER = 16  # bits of a float32 that a peak has
NOT_FINITE = INFINITE >> UPPER  # a peak from here on
SMALLEST = np.float32(2.0**-126)  # step: its inverse is finite, too
BITS = MANTISSA + 1  # of a float32's number


def factor(V: int, bits: int) -> np.float32:
    """The step over the peak, for V contributions in whole numbers of so many bits.

    V (peak / step + 1/2) stays below 2^(bits-1), with room for the rounding of float32 where these have fewer bits.
    """
    top = 2 ** (bits - 1) - 1 - V - (2 ** (bits - BITS + 4) if bits > BITS else 0)
    return np.float32(V / top)


@compiled
def peaks(vectors: Any, found: Any) -> None:
    """Write the peak of each block of vectors (K, n) float32 into found (blocks,) uint16."""
    K, n = vectors.shape
    for block in range(found.size):
        start, stop = block * BLOCK, min((block + 1) * BLOCK, n)
        peak = np.int32(0)
        for k in range(K):
            peak = max(peak, peak_bits(vectors[k, start:stop]))
        found[block] = min((np.int64(peak) + 0xFFFF) >> UPPER, NOT_FINITE)


@compiled
def _step(peak: Any, share: Any) -> Any:
    return max(from_bits(np.int32(peak) << UPPER) * share, SMALLEST)


@compiled
def round_and_sum(vectors: Any, peaks: Any, share: Any, total: Any) -> None:
    """Write the sum of vectors (K, n) float32, each rounded to the steps, into total (n,) int16 or int32.

    peaks (blocks,) uint16 are those of all contributions; share: see factor. Where a peak is not finite, total is 0.
    """
    K, n = vectors.shape
    sums = np.empty(BLOCK, np.int32)
    for block in range(peaks.size):
        start, stop = block * BLOCK, min((block + 1) * BLOCK, n)
        part, out = sums[: stop - start], total[start:stop]
        part[:] = 0
        if peaks[block] < NOT_FINITE:
            inverse = np.float32(1) / _step(peaks[block], share)
            for k in range(K):
                numbers = vectors[k, start:stop]
                for i in range(part.size):
                    part[i] += np.int32(np.rint(numbers[i] * inverse))
        for i in range(part.size):
            out[i] = part[i]


@compiled
def widen(total: Any, peaks: Any, share: Any, vector: Any) -> None:
    """Write what total (n,) stands for into vector (n,) float32; NaN where a peak is not finite."""
    for block in range(peaks.size):
        numbers = total[block * BLOCK : (block + 1) * BLOCK]
        out = vector[block * BLOCK : (block + 1) * BLOCK]
        if peaks[block] < NOT_FINITE:
            step = _step(peaks[block], share)
            for i in range(out.size):
                out[i] = np.float32(numbers[i]) * step
        else:
            out[:] = np.nan
