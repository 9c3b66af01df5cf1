"""The CPU as a device: the functions of arithmetic.py, on arrays that need not be brought anywhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from distconv.kernels.composed import Composed, ConvNormBackward
from distconv.kernels.cpu import arithmetic, elementwise, normalization, updates
from distconv.kernels.interface import FINITE, Agreed, Array

Result = TypeVar("Result")


class Host:
    """The memory of this process; its work is done when it is started."""

    def zeros(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        return np.zeros(shape, dtype)

    def upload(self, array: Array, start: int = 0) -> Array:
        return array

    def download(self, array: Array) -> Array:
        return array

    def copy(self, to: Array, source: Array) -> None:
        to[...] = source

    def replayed(self, key: Any, work: Callable[[], Result], agreed: Agreed | None = None) -> Result:
        return work()

    def join(self) -> None:
        pass

    def mark(self) -> None:
        return None

    def wait(self, mark: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class HostMailbox:
    """The messages of a step, where host and device are one."""

    def __init__(self) -> None:
        self.step, self.numbers, self.samples = 0, (), np.empty(0, np.int64)  # type: tuple[Any, Any, Any]
        self.bad = np.full(2, FINITE, np.int32)
        self.told: Sequence[Any] = ()

    def send(self, step: int, numbers: Sequence[float], samples: Any) -> None:
        self.step, self.numbers, self.samples = step, numbers, samples

    def begin(self, gradient: Array) -> None:
        gradient[...] = 0
        self.bad[...] = FINITE

    def taken(self) -> None:
        pass

    def collect(self, sums: Sequence[Any]) -> None:
        self.told = sums or self.told

    def sums(self, step: int) -> Sequence[float]:
        return self.told

    def bad_at(self, step: int) -> tuple[int, int]:
        return int(self.bad[0]), int(self.bad[1])


class Cpu(Composed):
    """This rank's cores. dtype: float64, float32, or float16 for forward passes alone.

    in_order: products, in float32 only, by loops whose bits hang on neither the processor nor the BLAS.
    """

    name, device, evaluation_batch = "cpu", Host(), 100

    conv_forward = staticmethod(arithmetic.conv_forward)
    conv_backward = staticmethod(arithmetic.conv_backward)
    conv_pool_forward = staticmethod(arithmetic.conv_pool_forward)
    conv_pool_backward = staticmethod(arithmetic.conv_pool_backward)
    max_pool_forward = staticmethod(arithmetic.max_pool_forward)
    max_pool_backward = staticmethod(arithmetic.max_pool_backward)
    average_pool_forward = staticmethod(arithmetic.average_pool_forward)
    average_pool_backward = staticmethod(arithmetic.average_pool_backward)
    pixel_mean = staticmethod(arithmetic.pixel_mean)
    pixel_mean_backward = staticmethod(arithmetic.pixel_mean_backward)
    affine_forward = staticmethod(arithmetic.affine_forward)
    affine_backward = staticmethod(arithmetic.affine_backward)
    relu = staticmethod(elementwise.relu)
    relu_backward = staticmethod(elementwise.relu_backward)
    norm_forward = staticmethod(normalization.norm_forward)
    norm_backward = staticmethod(normalization.norm_backward)
    norm_follow = staticmethod(normalization.norm_follow)
    norm_factors = staticmethod(normalization.norm_factors)
    scale_channels = staticmethod(normalization.scale_channels)
    plus = staticmethod(elementwise.plus)
    total = staticmethod(elementwise.total)
    join_channels = staticmethod(elementwise.join_channels)
    split_channels = staticmethod(elementwise.split_channels)
    scale = staticmethod(elementwise.scale)
    dropout = staticmethod(arithmetic.dropout)
    softmax_cross_entropy = staticmethod(arithmetic.softmax_cross_entropy)
    warp = staticmethod(arithmetic.warp)

    def __init__(self, dtype: DTypeLike = np.float32, in_order: bool = False) -> None:
        self.dtype = np.dtype(dtype)
        if in_order:
            from distconv.kernels.cpu.products import matmul

            for name in (
                "conv_forward", "conv_backward", "conv_pool_forward", "conv_pool_backward", "affine_forward",
                "affine_backward"
            ):  # fmt: skip
                setattr(self, name, functools.partial(getattr(arithmetic, name), multiply=matmul))

    def conv_norm(
        self, x: Array, w: Array, gamma: Array, beta: Array, epsilon: float, stride: int, pad: int, relu: bool,
        beside: Array | None = None
    ) -> tuple[Array, Array, Array, ConvNormBackward]:  # fmt: skip
        arguments = x, w, gamma, beta, epsilon, stride, pad, relu, beside
        if not (x.size and arithmetic.takes_winograd(x, w, stride, pad)):
            return super().conv_norm(*arguments)
        from distconv.kernels.cpu.conv_norm import conv_norm

        return conv_norm(*arguments)

    def uniform(self, count: int, key: tuple[int, int], step: int, samples: Array) -> Array:
        """Numbers from 0 to 1 -> (N, count); of a sample, key and step always the same."""
        return arithmetic.uniform(count, key, step, samples).astype(self.dtype)

    def mailbox(self, numbers: int, samples: int, sums: int) -> HostMailbox:
        return HostMailbox()

    def gather(self, images: Array, labels: Array, samples: Array) -> tuple[Array, Array]:
        return arithmetic.pixels(images[samples], self.dtype), labels[samples]

    def upload_labels(self, labels: Array) -> Array:
        return labels

    def argmax(self, scores: Array) -> Array:
        classes: Array = np.argmax(scores, axis=1)
        return classes

    def update(self, rule: Any, p: Array, g: Array, state: Sequence[Array], numbers: Any, bad: Array) -> None:
        if bad[1] == FINITE:
            rule.step(p, g, numbers, *state)

    def add(self, p: Array, g: Array, bad: Array) -> None:
        if bad[1] == FINITE:
            p += g

    def clip(self, gradients: Sequence[Array], most: float, bad: Array) -> None:
        if bad[1] == FINITE and (length := math.hypot(*map(updates.norm, gradients))) > most:
            for g in gradients:
                g *= g.dtype.type(most / length)

    def squared_norm(self, gradient: Array) -> float:
        return float(updates.squared_norm(gradient))

    def average(self, ema: Array, p: Array, share: Sequence[float], bad: Array) -> None:
        if bad[1] == FINITE:
            updates.average(ema, p, p.dtype.type(share[0]))

    def decay(self, p: Array, numbers: Any, bad: Array) -> None:
        if bad[1] == FINITE:
            p *= numbers[0]

    def checksum(self, vectors: Sequence[Array]) -> int:
        return sum(int(updates.checksum(vector.view(np.uint32))) for vector in vectors)
