"""8-bit numbers, rounded at random without bias: the loops of the int8 wire (distconv/comm/wire.py), compiled by Numba.

A number x of a block becomes floor(x / scale + u), with u uniform in [0, 1): the mean of what arrives is x. The scale
is the block's largest finite |x| / 126, so that nothing is cut off, rounded up to the upper 16 bits of a float32, as
which it travels. The codes 127 and -127 stand for infinities, and -128 for NaN.

The quotient is kept in units of 2^-24, as an int32 whose upper 8 bits, once 24 random bits are added, are the result.
As in half.py, the loops work on slices of one block, so that LLVM uses vectors: 41 us for 123,552 numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distconv.kernels.compiled import compiled
from distconv.kernels.half import INFINITE, finite_peak_bits, from_bits, peak_bits
from distconv.kernels.interface import BLOCK

INFINITY, NAN = 127, -128  # codes
LARGEST = 125.99  # a little less than 126, so that no rounding of a quotient leads above it
SMALLEST_SCALE = 0x0080  # upper bits of 2^-126, the smallest float32 whose inverse is one too, at full precision
FRACTION = 24  # bits


@compiled
def _block_key(key: Any) -> Any:
    """32 bits that hang on all bits of a key: the last steps of SplitMix64 (Steele, Lea, Flood 2014)."""
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.uint32(key >> np.uint64(32))


@compiled
def _random_bits(key: Any, i: int) -> Any:
    """24 random bits, of number i of a block: a counter through the 32-bit hash lowbias32 (Wellons 2018)."""
    word = np.uint32(key + np.uint32(i) * np.uint32(0x9E3779B9))
    word = np.uint32((word ^ (word >> np.uint32(16))) * np.uint32(0x7FEB352D))
    word = np.uint32((word ^ (word >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.int32(np.uint32(word ^ (word >> np.uint32(16))) >> np.uint32(8))


@compiled
def _scale_bits(peak: Any) -> Any:
    """The upper 16 bits of the scale of a block. peak: the bits of its largest finite |x|."""
    scale = np.float32(from_bits(peak) * np.float32(1 / LARGEST))
    return max((scale.view(np.int32) >> 16) + 1, SMALLEST_SCALE)


@compiled
def encode(x: Any, codes: Any, scales: Any, key: Any) -> None:
    """Write x (n,) float32 as codes (n or more,) int8 and the upper bits of a scale for each block, uint16.

    key: uint64, of the first block; that of the next one is 1 more.
    """
    for block in range((x.size + BLOCK - 1) // BLOCK):
        numbers = x[block * BLOCK : (block + 1) * BLOCK]
        out = codes[block * BLOCK : (block + 1) * BLOCK]
        peak = peak_bits(numbers)
        finite = peak < INFINITE
        if not finite:
            peak = finite_peak_bits(numbers)
        bits = _scale_bits(peak)
        inverse = np.float32(1) / from_bits(np.int32(bits << 16))
        block_key = _block_key(key + np.uint64(block))
        for i in range(numbers.size):
            units = np.int32(numbers[i] * inverse * np.float32(1 << FRACTION))
            out[i] = np.int8(np.int32(units + _random_bits(block_key, i)) >> np.int32(FRACTION))
        if not finite:
            for i in range(numbers.size):
                if np.isnan(numbers[i]):
                    out[i] = NAN
                elif np.isinf(numbers[i]):
                    out[i] = INFINITY if numbers[i] > 0 else -INFINITY
        scales[block] = np.uint16(bits)


@compiled
def decode(codes: Any, scales: Any, x: Any) -> None:
    """Write the numbers that codes and scales stand for into x (n,) float32."""
    for block in range((x.size + BLOCK - 1) // BLOCK):
        numbers = x[block * BLOCK : (block + 1) * BLOCK]
        wholes = codes[block * BLOCK : (block + 1) * BLOCK]
        scale = from_bits(np.int32(np.int32(scales[block]) << 16))
        for i in range(numbers.size):
            code = wholes[i]
            number = np.float32(code) * (scale if -INFINITY < code < INFINITY else np.float32(np.inf))
            numbers[i] = number if code != NAN else np.float32(np.nan)
