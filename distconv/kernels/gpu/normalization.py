"""Batch normalisation on a GPU: what kernels/cpu/normalization.py does, by the kernels of source/normalization.cu.

Pixels (M, C) are cut into strips. What is summed is summed strip by strip in one kernel; a second, small one adds up
the strips, in order, and finds what the third needs of each channel, which goes through the pixels again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distconv.kernels.gpu.device import Array
from distconv.kernels.gpu.launcher import THREADS, Launcher, check_count

WARP, AT_ONCE, PARTS = 32, 4, 32  # AT_ONCE and PARTS of normalization.cu
WIDE, ALIGNMENT = 4, 16  # numbers that a thread loads at once, where they begin at a multiple of so many bytes
ENOUGH_BLOCKS = 264  # to keep some 130 multiprocessors busy; fixed, as it decides the order of sums


@dataclass(frozen=True)
class Strips:
    """Pixels (M, C), cut for blocks of threads; see normalization.cu."""

    M: int
    C: int
    vector: int  # channels of a thread
    across: int  # threads side by side
    pixels: int  # of a strip

    @property
    def count(self) -> int:
        return -(-self.M // self.pixels)

    @property
    def blocks(self) -> int:
        return self.count * -(-self.C // (self.vector * self.across))

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.M, self.C, self.vector, self.across, self.pixels


def cut(M: int, C: int, wide: bool, summed: bool) -> Strips:
    """wide: channels can be loaded by fours. summed: there is something to add up, so strips are few."""
    vector = WIDE if wide else 1
    groups = -(-C // (vector * WARP))
    across = -(-C // (vector * groups))
    rows = THREADS // across
    least = -(-M // max(1, ENOUGH_BLOCKS // groups)) if summed else 1  # pixels of a strip
    return Strips(M, C, vector, across, max(rows * AT_ONCE, -(-least // rows) * rows))


class Normalization(Launcher):
    """The part of a Gpu that normalises."""

    def norm_forward(
        self, x: Array, gamma: Array, beta: Array, epsilon: float, relu: bool
    ) -> tuple[Array, Array, Array]:
        """As on the CPU. Mean and variance of no pixels are 0."""
        (x,), C = self._images(x), x.shape[-1]
        strips = self._cut([x], summed=True)
        partial, (mean, variance, factor) = self._new(strips.count, 2, C), (self._new(C) for _ in range(3))
        self._start("norm_statistics", strips, x, partial)
        found = partial, gamma, mean, variance, factor
        self._start_joining("norm_combine", C, *found, strips.M, C, strips.count, strips.pixels, float(epsilon))
        apply = self._cut([x], summed=False)
        y = self._like(x, lambda y: self._start("norm_apply", apply, x, mean, factor, beta, y, int(relu)))
        return y, mean, variance

    def norm_backward(
        self, x: Array, dy: Array, gamma: Array, beta: Array, mean: Array, variance: Array, epsilon: float, relu: bool,
        dgamma: Array, dbeta: Array
    ) -> Array:  # fmt: skip
        """As on the CPU."""
        images, C = self._images(x, dy), x.shape[-1]
        strips = self._cut(images, summed=True)
        partial, coefficients = self._new(strips.count, 2, C), self._new(3, C)
        channels = mean, gamma, variance, beta
        self._start("norm_gradient_sums", strips, *images, *channels, partial, float(epsilon), int(relu))
        found = partial, gamma, variance, coefficients, dgamma, dbeta
        self._start_joining("norm_gradient_combine", C, *found, strips.M, C, strips.count, float(epsilon))
        of_x = *images, mean, beta, coefficients
        apply = self._cut(images, summed=False)
        return self._like(x, lambda dx: self._start("norm_gradient", apply, *of_x, dx, int(relu)))

    def norm_follow(
        self, dmean: Array, dvariance: Array, running_mean: Array, running_variance: Array, mean: Array,
        variance: Array, share: float, unbiased: float
    ) -> None:  # fmt: skip
        """As on the CPU."""
        arrays = dmean, dvariance, running_mean, running_variance, mean, variance
        self.launch("normalization", "norm_follow", mean.size, *arrays, float(share), float(unbiased), mean.size)

    def norm_factors(
        self, gamma: Array, beta: Array, mean: Array, variance: Array, epsilon: float
    ) -> tuple[Array, Array]:
        """As on the CPU."""
        factor, offset = self._new(gamma.size), self._new(gamma.size)
        arrays = gamma, beta, mean, variance, factor, offset
        self.launch("normalization", "norm_factors", gamma.size, *arrays, float(epsilon), gamma.size)
        return factor, offset

    def scale_channels(self, x: Array, factor: Array, offset: Array, relu: bool) -> Array:
        """As on the CPU."""
        (x,) = self._images(x)
        strips = self._cut([x], summed=False)
        return self._like(x, lambda y: self._start("scale_channels", strips, x, factor, offset, y, int(relu)))

    def _new(self, *shape: int) -> Array:
        return self.device.empty(shape, np.float32)

    def _images(self, *arrays: Array) -> list[Array]:
        """Contiguous arrays of one shape (..., C), which a kernel goes through together."""
        check_count("batch normalisation", math.prod(arrays[0].shape))
        return [self.device.contiguous(array) for array in arrays]

    def _cut(self, images: Sequence[Array], summed: bool) -> Strips:
        shape = images[0].shape
        wide = shape[-1] % WIDE == 0 and all(self.device.address(array) % ALIGNMENT == 0 for array in images)
        return cut(math.prod(shape[:-1]), shape[-1], wide, summed)

    def _start(self, name: str, strips: Strips, *arguments: Array | float) -> None:
        """Start a kernel that goes through the strips."""
        self.launch("normalization", name, strips.blocks * THREADS, *arguments, *strips.sizes)

    def _start_joining(self, name: str, C: int, *arguments: Array | float) -> None:
        """Start a kernel that joins the strips of C channels."""
        self.launch("normalization", name, PARTS * C, *arguments)
