"""The compiled loops of kernels/cpu/direct.py: windows times filters, and pixels times pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from distconv.kernels.compiled import compiled
from distconv.kernels.cpu.products import ROWS
from distconv.kernels.cpu.vector import (
    LANES,
    LINE,
    Index,
    Pointer,
    Sum,
    Vector,
    ask,
    emitted,
    emitted_with,
    repeat,
    zeros,
)

Array = NDArray[Any]
AT_ONCE = 16  # pixels that gate takes together


def _in_planes(vector: int, plane: Index) -> Index:
    """From the first of a block's vectors to another one, where each LINE has a plane of its own."""
    return plane * (vector * LANES // LINE) + vector * LANES % LINE


def _windows(
    vectors: int, builder: ir.IRBuilder, x: Pointer, parts: Index, part_size: Index, W: Index, C: Index,
    sources: Pointer, rows: Index, columns: Index, w: Pointer, KH: Index, KW: Index, b: Pointer, floor: Vector,
    y: Pointer, F: Index, targets: Pointer, blocks: Index
) -> None:  # fmt: skip
    """y[targets] = max(b + windows of rows x columns taps at x[sources] times w, floor), ROWS of them a block."""
    w_row = KW * C * LINE
    w_part = KH * w_row
    with repeat(blocks) as block:
        pixels = [x + (sources + block * ROWS + i).index() * C for i in range(ROWS)]
        sums = [[Sum((b + LANES * j).load()) for j in range(vectors)] for _ in pixels]
        with repeat(parts) as part, repeat(rows) as row, repeat(columns * C) as k:
            at = w + w_part * part + w_row * row + k * LINE
            filters = [(at + _in_planes(j, parts * w_part)).load() for j in range(vectors)]
            for pixel, totals in zip(pixels, sums, strict=True):
                value = (pixel + part_size * part + W * C * row + k).spread()
                for weights, total in zip(filters, totals, strict=True):
                    total.set(value.times(weights, total.get()))
        for i, totals in enumerate(sums):
            place = y + (targets + block * ROWS + i).index() * F
            for j, total in enumerate(totals):
                (place + LANES * j).store(total.get().at_least(floor))


windows_1, windows_2 = (emitted_with(vectors, _windows) for vectors in (1, 2))


@compiled
def multiply_windows(
    x: Array, w: Array, b: Array, floor: np.float32, regions: Array, sources: Array, targets: Array, y: Array
) -> None:
    """y (N, OH, OW, F) = max(b + windows of x (parts, N, H, W, C) times w (F / 16, parts, KH, KW, C, 16), floor).

    The rest is a plan of direct.py. C counts the channels of a part of x.
    """
    parts, N, H, W, C = x.shape
    KH, KW, F = w.shape[2], w.shape[3], y.shape[3]
    images, filters, outputs = x.reshape(-1), w.reshape(-1), y.reshape(-1)
    for start, stop, i, rows, j, columns in regions:
        source, target, blocks = sources[start:], targets[start:], (stop - start) // ROWS
        for f in range(0, F, 2 * LANES):
            first = filters[(parts * f // LINE * KH * KW * C + (i * KW + j) * C) * LINE :]
            arguments = (images, parts, N * H * W * C, W, C, source, rows, columns, first, KH, KW, b[f:], floor)
            if F - f >= 2 * LANES:
                windows_2(*arguments, outputs[f:], F, target, blocks)
            else:
                windows_1(*arguments, outputs[f:], F, target, blocks)


@emitted
def gate_pixels(
    builder: ir.IRBuilder, dy: Pointer, y: Pointer, floor: Vector, lines: Index, first: Index, pixels: Index,
    all_pixels: Index, gated: Pointer, db: Pointer
) -> None:  # fmt: skip
    zero = zeros(builder)
    with repeat(lines) as line:
        ahead = dy + ((first + 2 * AT_ONCE) * lines + line * AT_ONCE) * LINE
        with repeat(pixels) as pixel:
            ask(ahead + pixel * LINE)
        for f in range(0, LINE, LANES):
            total = Sum((db + line * LINE + f).load())
            with repeat(pixels) as pixel:
                at, to = ((first + pixel) * lines + line) * LINE, (line * all_pixels + first + pixel) * LINE
                gradient = (dy + at + f).load().where((y + at + f).load().above(floor), zero)
                (gated + to + f).store(gradient)
                total.set(total.get() + gradient)
            (db + line * LINE + f).store(total.get())


@compiled
def gate(dy: Array, y: Array, floor: np.float32, gated: Array, db: Array) -> None:
    """gated (F / 16, N, OH, OW, 16) = dy (N, OH, OW, F) where y > floor (a floor of NaN: everywhere), else 0.

    Their sum goes to db (F,).
    """
    pixels = dy.size // len(db)
    for first in range(0, pixels, AT_ONCE):
        gate_pixels(dy, y, floor, len(db) // LINE, first, min(AT_ONCE, pixels - first), pixels, gated, db)


def _gradients(
    vectors: int, builder: ir.IRBuilder, x: Pointer, sources: Pointer, channels: Pointer, blocks: Index, dy: Pointer,
    targets: Pointer, pixels: Index, plane: Index, dw: Pointer, F: Index
) -> None:  # fmt: skip
    """dw (ROWS * blocks, vectors * LANES) += channels of the pixels of x at sources times filters of dy at targets."""
    with repeat(blocks) as block:
        places = [[dw + F * (block * ROWS + i) + LANES * j for j in range(vectors)] for i in range(ROWS)]
        sums = [[Sum(place.load()) for place in row] for row in places]
        starts = [x + (channels + block * ROWS + i).index() for i in range(ROWS)]
        with repeat(pixels) as pixel:
            at, to = (sources + pixel).index(), dy + (targets + pixel).index()
            gradients = [(to + _in_planes(j, plane)).load() for j in range(vectors)]
            for start, totals in zip(starts, sums, strict=True):
                value = (start + at).spread()
                for gradient, total in zip(gradients, totals, strict=True):
                    total.set(value.times(gradient, total.get()))
        for row, totals in zip(places, sums, strict=True):
            for place, total in zip(row, totals, strict=True):
                place.store(total.get())


gradients_1, gradients_2 = (emitted_with(vectors, _gradients) for vectors in (1, 2))


@compiled
def _pixels_inside(
    i: int, j: int, x_shape: tuple[int, ...], dy_shape: tuple[int, ...], stride: int, pad: int, sources: Array,
    targets: Array
) -> int:  # fmt: skip
    """Write where the pixels of x begin that the tap i, j sees, and those of dy that see them, in floats.

    Returns how many there are; in the order in which they lie.
    """
    _, H, W, C = x_shape
    _, N, OH, OW, _ = dy_shape
    pixels = 0
    for n in range(N):
        for oh in range(OH):
            h = oh * stride + i - pad
            if 0 <= h < H:
                for ow in range(OW):
                    w = ow * stride + j - pad
                    if 0 <= w < W:
                        sources[pixels] = ((n * H + h) * W + w) * C
                        targets[pixels] = ((n * OH + oh) * OW + ow) * LINE
                        pixels += 1
    return pixels


@compiled
def add_filter_gradients(x: Array, channels: Array, K: int, dy: Array, stride: int, pad: int, dw: Array) -> None:
    """Add to dw (K, K, channels, F) the products of x (N, H, W, C) and dy (F / 16, N, OH, OW, 16).

    channels: how far they lie from the beginning of a pixel of x; so many that they fill blocks of ROWS.
    """
    F, blocks, plane = dw.shape[-1], len(channels) // ROWS, dy[0].size
    images, gradients, sums = x.reshape(-1), dy.reshape(-1), dw.reshape(-1)
    # A list of pixels makes one loop of them: loops over rows and columns cost more than the products of a few pixels.
    sources, targets = np.empty(plane // LINE, np.int64), np.empty(plane // LINE, np.int64)
    for i in range(K):
        for j in range(K):
            pixels = _pixels_inside(i, j, x.shape, dy.shape, stride, pad, sources, targets)
            for f in range(0, F, 2 * LANES):
                first, to = gradients[f // LINE * plane :], sums[(i * K + j) * len(channels) * F + f :]
                arguments = (images, sources, channels, blocks, first, targets, pixels, plane, to, F)
                if F - f >= 2 * LANES:
                    gradients_2(*arguments)
                else:
                    gradients_1(*arguments)
