"""Batch normalisation on the CPU: in passes over pixels that lie in the first cache, for channels in multiples of 16.

For other channels and types, NumPy does it in more passes. Statistics are those of all pixels of all images together.
They are found in one pass: of a block of pixels around the mean of those before, the first one's around its own; then
blocks are joined in float64 (Chan, Golub and LeVeque 1983). So large means cost no accuracy: where the mean before is
far from that of a block, their difference makes the variance as large.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from llvmlite import ir

from distconv.kernels.compiled import compiled
from distconv.kernels.cpu.aligned import empty
from distconv.kernels.cpu.vector import LANES, Index, Pointer, Sum, Vector, emitted, emitted_with, repeat, zeros
from distconv.kernels.interface import Array

BLOCK_BYTES = 1 << 14  # of pixels that pass together: half of a core's first cache
WIDE = 16  # channels come in multiples of this, which both LANES divide
SIDE_BY_SIDE = 4  # sums, of which each has to wait for its last addition
NOTHING = np.empty(0, np.float32)


def norm_forward(x: Array, gamma: Array, beta: Array, epsilon: float, relu: bool) -> tuple[Array, Array, Array]:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta and, if asked, ReLU: x (..., C), gamma, beta (C,).

    Returns y (..., C), and mean and variance (C,) of the numbers of each channel (biased); those of no pixels are 0.
    """
    if _is_wide(x):
        moments = no_moments(x.shape[-1])
        add_statistics(x, 0, x.size // x.shape[-1], rows_of(x), moments)
        mean, variance = mean_and_variance(moments, x.size // x.shape[-1])
    else:
        pixels, M = _pixels(x), max(1, x.size // x.shape[-1])
        mean = (pixels.sum(axis=0, dtype=np.float64) / M).astype(x.dtype)
        variance = (np.square(pixels - mean).sum(axis=0, dtype=np.float64) / M).astype(x.dtype)
    return normalized(x, gamma, beta, mean, variance, epsilon, relu), mean, variance


def normalized(
    x: Array, gamma: Array, beta: Array, mean: Array, variance: Array, epsilon: float, relu: bool,
    beside: Array | None = None
) -> Array:  # fmt: skip
    """norm_forward with these statistics; beside (..., C), if there is one, is added before the ReLU."""
    return _scaled(x, mean, gamma / np.sqrt(variance + x.dtype.type(epsilon)), beta, relu, beside)


def norm_backward(
    x: Array, dy: Array, gamma: Array, beta: Array, mean: Array, variance: Array, epsilon: float, relu: bool,
    dgamma: Array, dbeta: Array
) -> Array:  # fmt: skip
    """The adjoint of norm_forward, which returned mean and variance: add to dgamma and dbeta (C,), return dx.

    The statistics depend on x, so dx = factor (g - mean(g) - s mean(g s)) with s = (x - mean) / deviation, and g = dy
    where y is positive, if there is a ReLU. Whether it is, is found from x: y need not be read again.
    """
    if _is_wide(x):
        found = norm_gradient(x, dy, None, gamma, beta, mean, variance, epsilon, relu, dgamma, dbeta)
        dx: Array = empty(*x.shape)
        write_gradient(*found, 0, x.size // x.shape[-1], rows_of(x), dx)
        return dx
    C, dtype = x.shape[-1], x.dtype.type
    M, inverse = max(1, x.size // C), 1 / np.sqrt(variance + dtype(epsilon))
    factor = gamma / np.sqrt(variance + dtype(epsilon))  # the bits of norm_forward
    gap = _pixels(x) - mean
    g, s = _pixels(dy) * (gap * factor + beta > 0) if relu else _pixels(dy), gap * inverse
    sums, products = (array.sum(axis=0, dtype=np.float64).astype(x.dtype) for array in (g, g * s))
    dx = (factor * (g - sums / dtype(M) - s * (products / dtype(M)))).reshape(x.shape)
    dgamma += products
    dbeta += sums
    return dx


class NormGradient(NamedTuple):
    """dx = factor g + slope (x - mean) + shift, to be computed; g = dy where factor (x - mean) + beta > floor, else 0.

    channels (5, C): mean, factor, beta, slope, shift. A floor of NaN: g = dy.
    """

    x: Array
    dy: Array
    channels: Array
    floor: np.float32


def norm_gradient(
    x: Array, dy: Array, y: Array | None, gamma: Array, beta: Array, mean: Array, variance: Array, epsilon: float,
    relu: bool, dgamma: Array, dbeta: Array
) -> NormGradient:  # fmt: skip
    """norm_backward without its last pass, for float32, channels in multiples of 16 and a pixel at least.

    y: what ReLU returned, where something was added before it; then dy of the result is what ReLU lets through.
    """
    C, M, inverse = x.shape[-1], x.size // x.shape[-1], 1 / np.sqrt(variance + np.float32(epsilon))
    factor = gamma / np.sqrt(variance + np.float32(epsilon))  # the bits of norm_forward
    floor = np.float32(0.0 if relu and y is None else np.nan)
    dy = np.ascontiguousarray(dy, np.float32)
    gated, values = (dy, NOTHING) if y is None or not relu else (empty(*dy.shape), y)
    channels = np.empty((5, C), np.float32)
    channels[:3] = mean, factor, beta
    sums, products = np.empty(C, np.float32), np.empty(C, np.float32)
    _gradient_sums(x, dy, values, gated, rows_of(x), floor, channels, sums, products)
    products *= inverse
    channels[3], channels[4] = -factor * inverse * products / np.float32(M), -factor * sums / np.float32(M)
    dgamma += products
    dbeta += sums
    return NormGradient(x, gated, channels, floor)


def norm_follow(
    dmean: Array, dvariance: Array, running_mean: Array, running_variance: Array, mean: Array, variance: Array,
    share: float, unbiased: float
) -> None:  # fmt: skip
    """Add to the gradients of running statistics (C,) what brings them `share` of the way to those of a batch."""
    dtype = dmean.dtype.type
    dmean += dtype(share) * (mean - running_mean)
    dvariance += dtype(share) * (dtype(unbiased) * variance - running_variance)


def norm_factors(gamma: Array, beta: Array, mean: Array, variance: Array, epsilon: float) -> tuple[Array, Array]:
    """factor and offset (C,) with gamma (x - mean) / sqrt(variance + epsilon) + beta = factor x + offset."""
    dtype = np.promote_types(gamma.dtype, np.float32)  # of halves, a variance and an epsilon would be lost
    gamma, beta, mean, variance = (array.astype(dtype, copy=False) for array in (gamma, beta, mean, variance))
    factor = gamma / np.sqrt(variance + dtype.type(epsilon))
    return factor, beta - mean * factor


def scale_channels(x: Array, factor: Array, offset: Array, relu: bool) -> Array:
    """factor x + offset and, if asked, ReLU: x (..., C), factor and offset (C,)."""
    return _scaled(x, np.zeros_like(factor), factor, offset, relu)


def _scaled(x: Array, mean: Array, factor: Array, offset: Array, relu: bool, beside: Array | None = None) -> Array:
    """factor (x - mean) + offset, what lies beside, if anything, and, if asked, ReLU."""
    if _is_wide(x):
        y, floor = empty(*x.shape), np.float32(0.0 if relu else -np.inf)
        other = NOTHING if beside is None else np.ascontiguousarray(beside, np.float32)
        _scale(x, rows_of(x), mean, factor, offset, floor, other, y)
        return y
    y = (x - mean) * factor + offset
    if beside is not None:
        y += beside
    if relu:
        np.maximum(y, 0, out=y)
    return y.astype(x.dtype, copy=False)


def _is_wide(x: Array) -> bool:
    return x.dtype == np.float32 and x.shape[-1] % WIDE == 0 and x.flags.c_contiguous and x.size > 0


def _pixels(x: Array) -> Array:
    """(..., C) -> (M, C)"""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def rows_of(x: Array) -> int:
    """How many pixels of x (..., C) pass together."""
    return max(16, BLOCK_BYTES // (x.itemsize * int(x.shape[-1])))


def no_moments(C: int) -> Array:
    """For add_statistics to begin with."""
    return np.zeros((2, C))


def mean_and_variance(moments: Array, M: int) -> tuple[Array, Array]:
    """Of the M pixels that add_statistics has seen (C,), float32."""
    mean, squares = moments
    return mean.astype(np.float32), (np.where(squares < 0, 0, squares) / M).astype(np.float32)  # NaN stays


@emitted
def block_statistics(
    builder: ir.IRBuilder, x: Pointer, at: Index, turns: Index, rest: Index, C: Index, c: Index, around: Pointer,
    gaps: Pointer, squares: Pointer
) -> None:  # fmt: skip
    """Sums of gaps and of squares around a number, of LANES channels of SIDE_BY_SIDE * turns + rest pixels."""
    start = (around + c).load()
    firsts, seconds = ([Sum(zeros(builder)) for _ in range(SIDE_BY_SIDE)] for _ in range(2))

    def add(row: Index, i: int) -> None:
        gap = (x + at + C * row).load() - start
        firsts[i].set(firsts[i].get() + gap)
        seconds[i].set(gap.times(gap, seconds[i].get()))

    with repeat(turns) as turn:
        for i in range(SIDE_BY_SIDE):
            add(turn * SIDE_BY_SIDE + i, i)
    with repeat(rest) as row:
        add(turns * SIDE_BY_SIDE + row, 0)
    for place, sums in ((gaps, firsts), (squares, seconds)):
        (place + c).store((sums[0].get() + sums[1].get()) + (sums[2].get() + sums[3].get()))


def _gap_and_g(
    x: Pointer, dy: Pointer, place: Index, middle: Vector, factor: Vector, offset: Vector, floor: Vector
) -> tuple[Vector, Vector]:
    """x - mean, and g: dy where factor (x - mean) + offset > floor; a floor of NaN: everywhere."""
    gap = (x + place).load() - middle
    return gap, (dy + place).load().where(gap.times(factor, offset).above(floor), zeros(x.builder))


@emitted
def block_gradient_sums(
    builder: ir.IRBuilder, x: Pointer, dy: Pointer, at: Index, rows: Index, C: Index, floor: Vector, mean: Pointer,
    factor: Pointer, offset: Pointer, c: Index, sums: Pointer, products: Pointer
) -> None:  # fmt: skip
    """Sums of g and of g (x - mean), of LANES channels of `rows` pixels."""
    gate = *((array + c).load() for array in (mean, factor, offset)), floor
    first, second = Sum(zeros(builder)), Sum(zeros(builder))
    with repeat(rows) as row:
        gap, g = _gap_and_g(x, dy, at + C * row, *gate)
        first.set(first.get() + g)
        second.set(gap.times(g, second.get()))
    (sums + c).store(first.get())
    (products + c).store(second.get())


@emitted
def block_gradient(
    builder: ir.IRBuilder, x: Pointer, dy: Pointer, at: Index, rows: Index, C: Index, floor: Vector, mean: Pointer,
    factor: Pointer, offset: Pointer, slope: Pointer, shift: Pointer, c: Index, dx: Pointer, to: Index
) -> None:  # fmt: skip
    """dx = factor g + slope (x - mean) + shift, of LANES channels of `rows` pixels."""
    middle, a, b, d, e = ((array + c).load() for array in (mean, factor, offset, slope, shift))
    with repeat(rows) as row:
        gap, g = _gap_and_g(x, dy, at + C * row, middle, a, b, floor)
        (dx + to + C * row).store(g.times(a, gap.times(d, e)))


@emitted
def gate_vectors(builder: ir.IRBuilder, dy: Pointer, y: Pointer, at: Index, vectors: Index, g: Pointer) -> None:
    """g = dy where y is positive, else 0, of so many vectors."""
    zero = zeros(builder)
    with repeat(vectors) as i:
        place = at + i * LANES
        (g + place).store((dy + place).load().where((y + place).load().exceeds(zero), zero))


def _block_scale(
    has_beside: int, builder: ir.IRBuilder, x: Pointer, at: Index, rows: Index, C: Index, mean: Pointer,
    factor: Pointer, offset: Pointer, floor: Vector, beside: Pointer, c: Index, y: Pointer
) -> None:  # fmt: skip
    """y = max(factor (x - mean) + offset + beside, floor), of LANES channels of `rows` pixels."""
    middle, a, b = ((array + c).load() for array in (mean, factor, offset))
    with repeat(rows) as row:
        place = at + C * row
        value = ((x + place).load() - middle).times(a, b)
        if has_beside:
            value = value + (beside + place).load()
        (y + place).store(value.at_least(floor))


block_scale, block_scale_and_add = (emitted_with(has_beside, _block_scale) for has_beside in (0, 1))


@compiled
def add_statistics(x: Array, first: int, stop: int, rows: int, moments: Array) -> None:
    """Join pixels first to stop of x (..., C) to moments (2, C) float64: mean, and squares around it, of those before.

    float32, contiguous, C a multiple of 16.
    """
    C = x.shape[-1]
    block, numbers = np.empty((3, C), np.float32), x.reshape(-1)
    if stop > first == 0:
        n = min(rows, stop)
        for row in range(n):
            for c in range(C):
                moments[0, c] += numbers[row * C + c]
        moments[0] /= n
    for start in range(first, stop, rows):
        n = min(rows, stop - start)
        for c in range(C):
            block[0, c] = moments[0, c]
        for c in range(0, C, LANES):
            turns, rest = n // SIDE_BY_SIDE, n % SIDE_BY_SIDE
            block_statistics(x, start * C + c, turns, rest, C, c, block[0], block[1], block[2])
        for c in range(C):
            total = np.float64(block[1, c])
            gap = block[0, c] + total / n - moments[0, c]
            moments[0, c] += gap * (n / (start + n))
            moments[1, c] += block[2, c] - total * total / n + gap * gap * (start * n / (start + n))


@compiled
def _gradient_sums(
    x: Array, dy: Array, y: Array, g: Array, rows: int, floor: np.float32, channels: Array, sums: Array, products: Array
) -> None:
    """The sums over all pixels of g and of g (x - mean); where there is a y, g is written: dy where y is positive."""
    C = x.shape[-1]
    M = x.size // C
    block_sums, block_products = np.empty(C, np.float32), np.empty(C, np.float32)
    all_sums, all_products = np.zeros(C), np.zeros(C)
    mean, factor, offset = channels[0], channels[1], channels[2]
    for first in range(0, M, rows):
        n = min(rows, M - first)
        if y.size:
            gate_vectors(dy, y, first * C, n * C // LANES, g)
        for c in range(0, C, LANES):
            at = first * C + c
            block_gradient_sums(x, g, at, n, C, floor, mean, factor, offset, c, block_sums, block_products)
        for c in range(C):
            all_sums[c] += block_sums[c]
            all_products[c] += block_products[c]
    for c in range(C):
        sums[c] = all_sums[c]
        products[c] = all_products[c]


@compiled
def write_gradient(
    x: Array, dy: Array, channels: Array, floor: np.float32, first: int, stop: int, rows: int, dx: Array
) -> None:
    """Compute a NormGradient for pixels first to stop of x; they go to the beginning of dx."""
    C = x.shape[-1]
    mean, factor, offset, slope, shift = channels[0], channels[1], channels[2], channels[3], channels[4]
    for start in range(first, stop, rows):
        n, at, to = min(rows, stop - start), start * C, (start - first) * C
        for c in range(0, C, LANES):
            block_gradient(x, dy, at + c, n, C, floor, mean, factor, offset, slope, shift, c, dx, to + c)


@compiled
def _scale(
    x: Array, rows: int, mean: Array, factor: Array, offset: Array, floor: np.float32, beside: Array, y: Array
) -> None:
    C = x.shape[-1]
    M = x.size // C
    for first in range(0, M, rows):
        n = min(rows, M - first)
        for c in range(0, C, LANES):
            at = first * C + c
            if beside.size:
                block_scale_and_add(x, at, n, C, mean, factor, offset, floor, beside, c, y)
            else:
                block_scale(x, at, n, C, mean, factor, offset, floor, beside, c, y)
