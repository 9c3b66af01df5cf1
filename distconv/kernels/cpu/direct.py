"""Convolution with filters of any size and stride, float32: a matrix product that reads its windows where they lie.

ROWS windows of x times one or two vectors of filters stay in registers from the first tap to the last (implicit GEMM:
Chetlur et al. 2014, arXiv 1410.0759), so there are no patches. Windows that have the same taps inside their image are
taken together, so nothing is padded and no zero is multiplied. dx falls into stride x stride phases, each of which is
such a convolution of dy with some of the filters, turned round; dw is a product over all pixels for each tap. A few
images pass through all of it at a time, so that they stay in a core's cache.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distconv.kernels.cpu.aligned import empty
from distconv.kernels.cpu.products import ROWS
from distconv.kernels.cpu.taps import add_filter_gradients, gate, multiply_windows
from distconv.kernels.cpu.vector import LINE
from distconv.kernels.interface import output_size

Array = NDArray[Any]
CACHE = 1 << 17  # floats: half of a core's L2 cache to fill with images


class Axis(NamedTuple):
    """Windows along an axis: how many taps each has, how far apart they lie, how far the first lies outside the image.

    Their outputs go to every step-th place from `first` on.
    """

    taps: int
    stride: int
    pad: int
    step: int = 1
    first: int = 0


def conv_forward(x: Array, w: Array, b: Array, stride: int, pad: int, relu: bool) -> Array:
    """Convolution, bias and, if asked, ReLU: x (N, H, W, C), w (K, K, C, F), b (F,) -> y (N, OH, OW, F), all float32.

    F is a multiple of 16.
    """
    (N, H, W, C), (K, _, _, F) = x.shape, w.shape
    y = empty(N, output_size(H, K, stride, pad), output_size(W, K, stride, pad), F)
    filters = _in_lines(np.ascontiguousarray(w)).reshape(F // LINE, 1, K, K, C, LINE)
    axis, floor = Axis(K, stride, pad), np.float32(0.0 if relu else -np.inf)
    x = np.ascontiguousarray(x)
    for images in _few_at_a_time(x, y, w):
        plan = _plan(images.stop - images.start, x.shape[1:3], y.shape[1:3], axis, axis)
        multiply_windows(x[None, images], filters, b, floor, *plan, y[images])
    return y


def conv_backward(
    x: Array, y: Array, dy: Array, w: Array, stride: int, pad: int, relu: bool, dw: Array, db: Array, wants_dx: bool
) -> Array | None:
    """The adjoint of conv_forward: add to dw (K, K, C, F) and db (F,), return dx (N, H, W, C) if it is wanted.

    dx needs a C that is a multiple of 16.
    """
    C, F = w.shape[2:]
    dx = empty(*(x.shape if wants_dx else (0, 0, 0, 0)))
    phases = list(_phases(w, stride, pad)) if wants_dx else []
    nothing, everything = np.zeros(C, np.float32), np.float32(-np.inf)
    floor = np.float32(0.0 if relu else np.nan)
    x, y, dy = (np.ascontiguousarray(array, np.float32) for array in (x, y, dy))
    seen, channels, taps, sums, inside = _channels(x, dw, pad)
    for images in _few_at_a_time(x, y, w):
        gated = empty(F // LINE, *dy[images].shape[:3], LINE)
        gate(dy[images], y[images], floor, gated, db)
        part = seen[images]
        if C % LINE == 0 and dw.size > C * LINE:  # else its numbers are not used often enough to be copied for it
            part, channels = _planes(part)
        add_filter_gradients(part, channels, taps, gated, stride, inside, sums)
        for down, across, turned in phases:
            plan = _plan(images.stop - images.start, y.shape[1:3], x.shape[1:3], down, across)
            multiply_windows(gated, turned, nothing, everything, *plan, dx[images])
    if sums is not dw:
        dw += sums[: dw.size // F].reshape(dw.shape)
    return dx if wants_dx else None


def _channels(x: Array, dw: Array, pad: int) -> tuple[Array, Array, int, Array, int]:
    """What add_filter_gradients is to be given of x and dw: images, offsets of channels, taps, sums, padding.

    Channels that fill no line count with their taps as one tap of K*K*C channels, in images with padding.
    """
    (N, H, W, C), (K, _, _, F) = x.shape, dw.shape
    if C % LINE == 0:
        return x, np.arange(C), K, dw, pad
    padded = np.zeros((N, H + 2 * pad, W + 2 * pad, C), x.dtype)
    padded[:, pad : pad + H, pad : pad + W] = x
    row, column, channel = np.indices((K, K, C))
    offsets = ((row * (W + 2 * pad) + column) * C + channel).reshape(-1)
    offsets = np.pad(offsets, (0, -len(offsets) % ROWS))  # what fills the last block up is computed for nothing
    return padded, offsets, 1, np.zeros((len(offsets), F), np.float32), 0


def _planes(x: Array) -> tuple[Array, Array]:
    """A copy of x (N, H, W, C), (C / 16 * N, H, W, 16), and how far its channels lie from the beginning of a pixel.

    A product reads few channels of many pixels, which would lie apart, and in the same few places of a cache.
    """
    N, H, W, C = x.shape
    c = np.arange(C)
    return _in_lines(x).reshape(-1, H, W, LINE), c // LINE * (N * H * W * LINE) + c % LINE


def _in_lines(x: Array) -> Array:
    """A copy of x (..., C), (C / 16, ..., 16); NumPy's takes up to four times as long."""
    *places, C = x.shape
    lines = empty(C // LINE, *places, LINE)
    gate(x, x, np.float32(np.nan), lines, np.zeros(C, np.float32))
    return lines


def _phases(w: Array, stride: int, pad: int) -> Iterator[tuple[Axis, Axis, Array]]:
    """The convolutions of dy that make up dx: how their windows lie down and across, and their filters.

    dx[h] is the sum of dy[o] * w[i] over all o and i with stride * o + i = h + pad. So h = stride * a + first sees the
    taps i = begin, begin + stride, ... with dy[a + (first + pad) // stride], and with the ones before it.
    """
    axes = []
    for first in range(stride):
        begin = (first + pad) % stride
        taps = len(range(begin, len(w), stride))
        axes.append((begin, Axis(taps, 1, taps - 1 - (first + pad) // stride, stride, first)))
    for (i, down), (j, across) in itertools.product(axes, axes):
        yield down, across, _in_planes(w[i::stride, j::stride][::-1, ::-1].transpose(0, 1, 3, 2))


def _few_at_a_time(x: Array, y: Array, w: Array) -> list[slice]:
    """The batch in parts. All filters pass through the cache with each, so large filters call for larger parts."""
    if not (N := len(x)):
        return []
    most = max(1, N * (CACHE + w.size) // (x.size + y.size))
    few = -(-N // -(-N // most))  # as many rounds, but even ones
    return [slice(start, min(start + few, N)) for start in range(0, N, few)]


def _in_planes(w: Array) -> Array:
    """Filters (KH, KW, C, F) -> (F / 16, C / 16, KH, KW, 16, 16), in the order in which they are read."""
    KH, KW, C, F = w.shape
    parted = w.reshape(KH, KW, C // LINE, LINE, F // LINE, LINE)
    return np.ascontiguousarray(parted.transpose(4, 2, 0, 1, 3, 5))


@functools.lru_cache(maxsize=1024)
def _plan(
    images: int, x_size: tuple[int, int], y_size: tuple[int, int], down: Axis, across: Axis
) -> tuple[Array, Array, Array]:
    """Where windows of so many images begin, by pixels of x, where their outputs go, by pixels of y, and regions.

    A region has windows with the same taps inside the image: (first window, end, first tap down, taps, first tap
    across, taps). Where they fill no whole blocks of ROWS, the last window comes again.
    """
    regions, places, stop = [], [np.empty((2, 0), np.int64)], 0
    image = np.arange(images)[:, None, None]
    for i, rows, h in _stretches(x_size[0], y_size[0], down):
        for j, columns, v in _stretches(x_size[1], y_size[1], across):
            from_h, from_w = (h * down.stride - down.pad + i)[:, None], v * across.stride - across.pad + j
            to_h, to_w = (h * down.step + down.first)[:, None], v * across.step + across.first
            source = (image * x_size[0] + from_h) * x_size[1] + from_w
            target = (image * y_size[0] + to_h) * y_size[1] + to_w
            both = np.stack([source.reshape(-1), target.reshape(-1)])
            places.append(np.pad(both, ((0, 0), (0, -both.shape[1] % ROWS)), mode="edge"))
            start, stop = stop, stop + places[-1].shape[1]
            regions.append((start, stop, i, rows, j, columns))
    return np.array(regions, np.int64).reshape(-1, 6), *np.concatenate(places, axis=1)


def _stretches(size: int, outputs: int, axis: Axis) -> Iterator[tuple[int, int, Array]]:
    """The windows along an axis in runs that have the same taps inside: first tap, taps, numbers of the windows."""

    def inside(window: int) -> tuple[int, int]:
        start = window * axis.stride - axis.pad
        first = min(max(0, -start), axis.taps)
        return first, max(0, min(axis.taps, size - start) - first)

    windows = range(len(range(axis.first, outputs, axis.step)))
    for (first, taps), run in itertools.groupby(windows, inside):
        yield first, taps, np.array(list(run), np.int64)
