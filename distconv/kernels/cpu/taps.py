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
    vectors: int, builder: ir.IRBuilder, x: Pointer, H: Index, W: Index, C: Index, stride: Index, channels: Pointer,
    blocks: Index, dy: Pointer, plane: Index, OH: Index, OW: Index, images: Index, rows: Index, columns: Index,
    dw: Pointer, F: Index
) -> None:  # fmt: skip
    """dw (ROWS * blocks, vectors * LANES) += channels of x times filters of dy, over a rectangle of all images."""
    with repeat(blocks) as block:
        places = [[dw + F * (block * ROWS + i) + LANES * j for j in range(vectors)] for i in range(ROWS)]
        sums = [[Sum(place.load()) for place in row] for row in places]
        starts = [x + (channels + block * ROWS + i).index() for i in range(ROWS)]
        with repeat(images) as n, repeat(rows) as h, repeat(columns) as v:
            at, pixel = ((n * H + h * stride) * W + v * stride) * C, dy + ((n * OH + h) * OW + v) * LINE
            gradients = [(pixel + _in_planes(j, plane)).load() for j in range(vectors)]
            for start, totals in zip(starts, sums, strict=True):
                value = (start + at).spread()
                for gradient, total in zip(gradients, totals, strict=True):
                    total.set(value.times(gradient, total.get()))
        for row, totals in zip(places, sums, strict=True):
            for place, total in zip(row, totals, strict=True):
                place.store(total.get())


gradients_1, gradients_2 = (emitted_with(vectors, _gradients) for vectors in (1, 2))


@compiled
def _inside(tap: int, size: int, windows: int, stride: int, pad: int) -> tuple[int, int]:
    """The first window whose tap lies inside an image of this size, and how many do."""
    first = max(0, (pad - tap + stride - 1) // stride)
    return first, max(0, min(windows, (size - 1 + pad - tap) // stride + 1) - first)


@compiled
def add_filter_gradients(x: Array, channels: Array, K: int, dy: Array, stride: int, pad: int, dw: Array) -> None:
    """Add to dw (K, K, channels, F) the products of x (N, H, W, C) and dy (F / 16, N, OH, OW, 16).

    channels: how far they lie from the beginning of a pixel of x; so many that they fill blocks of ROWS.
    """
    _, H, W, C = x.shape
    _, N, OH, OW, _ = dy.shape
    F, blocks = dw.shape[-1], len(channels) // ROWS
    images, gradients, sums = x.reshape(-1), dy.reshape(-1), dw.reshape(-1)
    for f in range(0, F, 2 * LANES):
        for i in range(K):
            h, rows = _inside(i, H, OH, stride, pad)
            for j in range(K):
                v, columns = _inside(j, W, OW, stride, pad)
                if rows > 0 and columns > 0:
                    seen = images[((h * stride + i - pad) * W + v * stride + j - pad) * C :]
                    first = gradients[(f // LINE * N * OH * OW + h * OW + v) * LINE :]
                    plane = N * OH * OW * LINE
                    arguments = (seen, H, W, C, stride, channels, blocks, first, plane, OH, OW, N, rows, columns)
                    to = sums[(i * K + j) * len(channels) * F + f :]
                    if F - f >= 2 * LANES:
                        gradients_2(*arguments, to, F)
                    else:
                        gradients_1(*arguments, to, F)
