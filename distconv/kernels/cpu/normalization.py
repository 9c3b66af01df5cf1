"""Batch normalisation on the CPU: in passes over pixels that lie in the first cache, for channels in multiples of 16.

For other channels and types, NumPy does it in more passes. Statistics are those of all pixels of all images together.
They are found in one pass: of a block of pixels in two, while it is in the cache, and then blocks are joined in float64
(Chan, Golub and LeVeque 1983), so large means cost no accuracy.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir

from distconv.kernels.compiled import compiled
from distconv.kernels.cpu.aligned import empty
from distconv.kernels.cpu.vector import LANES, Index, Pointer, Sum, Vector, emitted, repeat, zeros
from distconv.kernels.interface import Array

BLOCK_BYTES = 1 << 14  # of pixels that pass together: half of a core's first cache
WIDE = 16  # channels come in multiples of this, which both LANES divide


def norm_forward(x: Array, gamma: Array, beta: Array, epsilon: float, relu: bool) -> tuple[Array, Array, Array]:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta and, if asked, ReLU: x (..., C), gamma, beta (C,).

    Returns y (..., C), and mean and variance (C,) of the numbers of each channel (biased).
    """
    pixels = _pixels(x)
    if _is_wide(x):
        mean, variance = (np.empty(x.shape[-1], x.dtype) for _ in range(2))
        _statistics(pixels, _rows(x), mean, variance)
    else:
        mean = pixels.mean(axis=0, dtype=np.float64).astype(x.dtype)
        variance = np.square(pixels - mean).mean(axis=0, dtype=np.float64).astype(x.dtype)
    factor = gamma / np.sqrt(variance + x.dtype.type(epsilon))
    return _scaled(x, mean, factor, beta, relu), mean, variance


def norm_backward(
    x: Array, dy: Array, gamma: Array, beta: Array, mean: Array, variance: Array, epsilon: float, relu: bool,
    dgamma: Array, dbeta: Array
) -> Array:  # fmt: skip
    """The adjoint of norm_forward, which returned mean and variance: add to dgamma and dbeta (C,), return dx.

    The statistics depend on x, so dx = factor (g - mean(g) - s mean(g s)) with s = (x - mean) / deviation, and g = dy
    where y is positive, if there is a ReLU. Whether it is, is found from x: y need not be read again.
    """
    C, dtype = x.shape[-1], x.dtype.type
    M, inverse = x.size // C, 1 / np.sqrt(variance + dtype(epsilon))
    factor = gamma / np.sqrt(variance + dtype(epsilon))  # the bits of norm_forward
    if _is_wide(x):
        sums, products, dx = np.empty(C, x.dtype), np.empty(C, x.dtype), empty(*x.shape)
        floor = np.float32(0.0 if relu else np.nan)
        arrays = _pixels(x), _pixels(np.ascontiguousarray(dy)), _rows(x), floor, mean, factor, beta
        _gradient_sums(*arrays, sums, products)
        products *= inverse
        slope, shift = -factor * inverse * products / dtype(M), -factor * sums / dtype(M)
        _gradient(*arrays, slope, shift, _pixels(dx))
    else:
        gap = _pixels(x) - mean
        g, s = _pixels(dy) * (gap * factor + beta > 0) if relu else _pixels(dy), gap * inverse
        sums, products = (array.sum(axis=0, dtype=np.float64).astype(x.dtype) for array in (g, g * s))
        dx = (factor * (g - sums / dtype(M) - s * (products / dtype(M)))).reshape(x.shape)
    dgamma += products
    dbeta += sums
    return dx


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


def _scaled(x: Array, mean: Array, factor: Array, offset: Array, relu: bool) -> Array:
    """factor (x - mean) + offset and, if asked, ReLU."""
    if _is_wide(x):
        y = empty(*x.shape)
        _scale(_pixels(x), _rows(x), mean, factor, offset, np.float32(0.0 if relu else -np.inf), _pixels(y))
        return y
    y = (x - mean) * factor + offset
    if relu:
        np.maximum(y, 0, out=y)
    return y.astype(x.dtype, copy=False)


def _is_wide(x: Array) -> bool:
    return x.dtype == np.float32 and x.shape[-1] % WIDE == 0 and x.flags.c_contiguous and x.size > 0


def _pixels(x: Array) -> Array:
    """(..., C) -> (M, C)"""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _rows(x: Array) -> int:
    """How many pixels pass together."""
    return max(16, BLOCK_BYTES // (x.itemsize * int(x.shape[-1])))


@emitted
def block_statistics(
    builder: ir.IRBuilder, x: Pointer, at: Index, rows: Index, C: Index, share: Vector, c: Index, mean: Pointer,
    rest: Pointer, squares: Pointer
) -> None:  # fmt: skip
    """mean, and the sums of gaps and of squares around it, of LANES channels of `rows` pixels; share: 1 / rows.

    The sum of the gaps would be 0, were the mean not rounded.
    """
    total, gaps, around = (Sum(zeros(builder)) for _ in range(3))
    with repeat(rows) as row:
        total.set(total.get() + (x + at + C * row).load())
    middle = total.get() * share
    with repeat(rows) as row:
        gap = (x + at + C * row).load() - middle
        gaps.set(gaps.get() + gap)
        around.set(gap.times(gap, around.get()))
    (mean + c).store(middle)
    (rest + c).store(gaps.get())
    (squares + c).store(around.get())


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
    factor: Pointer, offset: Pointer, slope: Pointer, shift: Pointer, c: Index, dx: Pointer
) -> None:  # fmt: skip
    """dx = factor g + slope (x - mean) + shift, of LANES channels of `rows` pixels."""
    middle, a, b, d, e = ((array + c).load() for array in (mean, factor, offset, slope, shift))
    with repeat(rows) as row:
        place = at + C * row
        gap, g = _gap_and_g(x, dy, place, middle, a, b, floor)
        (dx + place).store(g.times(a, gap.times(d, e)))


@emitted
def block_scale(
    builder: ir.IRBuilder, x: Pointer, at: Index, rows: Index, C: Index, mean: Pointer, factor: Pointer,
    offset: Pointer, floor: Vector, c: Index, y: Pointer
) -> None:  # fmt: skip
    """y = max(factor (x - mean) + offset, floor), of LANES channels of `rows` pixels."""
    middle, a, b = ((array + c).load() for array in (mean, factor, offset))
    with repeat(rows) as row:
        place = at + C * row
        (y + place).store(((x + place).load() - middle).times(a, b).at_least(floor))


@compiled
def _statistics(x: Array, rows: int, mean: Array, variance: Array) -> None:
    M, C = x.shape
    block_mean, block_rest, block_squares = np.empty(C, np.float32), np.empty(C, np.float32), np.empty(C, np.float32)
    middle, squares = np.zeros(C), np.zeros(C)
    for first in range(0, M, rows):
        n = min(rows, M - first)
        for c in range(0, C, LANES):
            block_statistics(x, first * C + c, n, C, np.float32(1 / n), c, block_mean, block_rest, block_squares)
        for c in range(C):
            rest = np.float64(block_rest[c])
            gap = block_mean[c] + rest / n - middle[c]
            middle[c] += gap * (n / (first + n))
            squares[c] += block_squares[c] - rest * rest / n + gap * gap * (first * n / (first + n))
    for c in range(C):
        mean[c] = middle[c]
        variance[c] = 0.0 if squares[c] < 0 else squares[c] / M  # NaN stays


@compiled
def _gradient_sums(
    x: Array, dy: Array, rows: int, floor: np.float32, mean: Array, factor: Array, offset: Array, sums: Array,
    products: Array
) -> None:  # fmt: skip
    M, C = x.shape
    block_sums, block_products = np.empty(C, np.float32), np.empty(C, np.float32)
    all_sums, all_products = np.zeros(C), np.zeros(C)
    for first in range(0, M, rows):
        n = min(rows, M - first)
        for c in range(0, C, LANES):
            at = first * C + c
            block_gradient_sums(x, dy, at, n, C, floor, mean, factor, offset, c, block_sums, block_products)
        for c in range(C):
            all_sums[c] += block_sums[c]
            all_products[c] += block_products[c]
    for c in range(C):
        sums[c] = all_sums[c]
        products[c] = all_products[c]


@compiled
def _gradient(
    x: Array, dy: Array, rows: int, floor: np.float32, mean: Array, factor: Array, offset: Array, slope: Array,
    shift: Array, dx: Array
) -> None:  # fmt: skip
    M, C = x.shape
    for first in range(0, M, rows):
        n = min(rows, M - first)
        for c in range(0, C, LANES):
            block_gradient(x, dy, first * C + c, n, C, floor, mean, factor, offset, slope, shift, c, dx)


@compiled
def _scale(x: Array, rows: int, mean: Array, factor: Array, offset: Array, floor: np.float32, y: Array) -> None:
    M, C = x.shape
    for first in range(0, M, rows):
        n = min(rows, M - first)
        for c in range(0, C, LANES):
            block_scale(x, first * C + c, n, C, mean, factor, offset, floor, c, y)
