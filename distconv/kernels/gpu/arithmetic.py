"""The arithmetic on a GPU: the functions of kernels/cpu/arithmetic.py on arrays of a device, by the kernels of source/.

The shapes of a convolution are compiled into its kernels. Nothing here waits for the GPU but `argmax`, which a training
step does not use, so a whole step can be recorded as a graph. All sums are made in a fixed order, so two runs give the
same bits. Arrays are float32 and contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from distconv.kernels.composed import Composed
from distconv.kernels.gpu.convolution import Convolution
from distconv.kernels.gpu.device import Array
from distconv.kernels.gpu.launcher import MOST, THREADS, check_count, source
from distconv.kernels.gpu.mailbox import GpuMailbox
from distconv.kernels.gpu.normalization import Normalization
from distconv.kernels.interface import output_size

CAPABILITY = 80  # that a GPU must have, 10 times: its tensor cores take tf32 and bfloat16
FINISH_OUTPUTS = 32  # OUTPUTS of sums.cu
PARTS_OF_PIXELS, SIDE_BY_SIDE = 8, 4  # of layers.cu


class Gpu(Normalization, Composed):
    """The functions of kernels/cpu/arithmetic.py, for arrays of a device (a Cuda of device.py).

    apart: whether the gradients of filters may be computed beside the rest, until device.join().
    """

    name, dtype, evaluation_batch = "cuda", np.dtype(np.float32), 2000

    def __init__(self, device: Any, precision: str = "float32", apart: bool = False) -> None:
        super().__init__(device)
        self.precision, self.apart = precision, apart
        self.no_floats, self.no_bytes = device.zeros(4, np.float32), device.zeros(4, np.uint8)

    def conv_forward(self, x: Array, w: Array, b: Array | None, stride: int, pad: int, relu: bool) -> Array:
        """As on the CPU."""
        shape = _convolution(x.shape, w.shape, stride, pad, relu, b)
        y = self.device.empty((len(x), shape.OH, shape.OW, shape.F), np.float32)
        self._multiply(shape, "forward", len(x), x=x, w=w, bias=b, out=y)
        return y

    def conv_backward(
        self, x: Array, y: Array, dy: Array, w: Array, stride: int, pad: int, relu: bool, dw: Array, db: Array | None,
        wants_dx: bool
    ) -> Array | None:  # fmt: skip
        """As on the CPU."""
        return self._adjoint(_convolution(x.shape, w.shape, stride, pad, relu, db), x, y, dy, w, dw, db, wants_dx)

    def conv_pool_forward(self, x: Array, w: Array, b: Array, stride: int, pad: int, relu: bool) -> tuple[Array, Array]:
        """As on the CPU, in one kernel."""
        shape = replace(_convolution(x.shape, w.shape, stride, pad, relu, b), pooled=True)
        y = self.device.empty((len(x), shape.OH // 2, shape.OW // 2, shape.F), np.float32)
        winner = self.device.empty(y.shape, np.uint8)
        self._multiply(shape, "forward", len(x), x=x, w=w, bias=b, out=y, winner=winner)
        return y, winner

    def conv_pool_backward(
        self, x: Array, winner: Array, dy: Array, w: Array, stride: int, pad: int, relu: bool, dw: Array, db: Array,
        wants_dx: bool
    ) -> Array | None:  # fmt: skip
        """As on the CPU."""
        shape = replace(_convolution(x.shape, w.shape, stride, pad, relu, db), pooled=True)
        return self._adjoint(shape, x, winner, dy, w, dw, db, wants_dx)

    def affine_forward(self, x: Array, w: Array, b: Array, relu: bool) -> Array:
        """As on the CPU: the convolution of images of one pixel."""
        (N, C), F = x.shape, w.shape[1]
        return self.conv_forward(x.reshape(N, 1, 1, C), w.reshape(1, 1, C, F), b, 1, 0, relu).reshape(N, F)

    def affine_backward(self, x: Array, y: Array, dy: Array, w: Array, relu: bool, dw: Array, db: Array) -> Array:
        """As on the CPU."""
        (N, C), F = x.shape, w.shape[1]
        shape = _convolution((N, 1, 1, C), (1, 1, C, F), 1, 0, relu, db)
        dx = self._adjoint(shape, x.reshape(N, 1, 1, C), y, dy, w, dw, db, wants_dx=True)
        assert dx is not None
        return dx.reshape(N, C)

    def _adjoint(
        self, shape: Convolution, x: Array, gate: Array, dy: Array, w: Array, dw: Array, db: Array | None,
        wants_dx: bool
    ) -> Array | None:  # fmt: skip
        """gate: what tells where dy counts, winner or y."""
        gates = {"won" if shape.pooled else "y": gate}

        def filters() -> None:
            self._multiply(shape, "filters", len(x), x=x, dy=dy, **gates, out=dw, db=db)

        if not wants_dx or not self.apart:
            filters()
        else:
            self.device.beside(filters, x, dy, gate)
        if not wants_dx:
            return None
        dx = self.device.empty(x.shape, np.float32)
        self._multiply(shape, "input", len(x), w=w, dy=dy, **gates, out=dx)
        return dx

    def _multiply(
        self, shape: Convolution, which: str, N: int, *, out: Array, x: Array = None, w: Array = None, dy: Array = None,
        y: Array = None, won: Array = None, bias: Array = None, db: Array = None, winner: Array = None
    ) -> None:  # fmt: skip
        """Run a pass of convolution.cu, with the arrays that it uses."""
        rows, columns, depth = shape.product(which, N)
        if max(rows * columns, N * shape.H * shape.W * shape.C, shape.pixels(N) * shape.F) > MOST:
            raise ValueError(f"a layer of {shape} on {N} images is more than a kernel can count: use a smaller batch")
        x, w, dy, y, bias, db = (
            self.no_floats if a is None else self.device.contiguous(a) for a in (x, w, dy, y, bias, db)
        )
        won, winner = (self.no_bytes if a is None else a for a in (won, winner))
        plan = shape.plan(which, N, self.precision, self.device.address(w) % 16 == 0)
        slices = plan.grid[2]
        partial = self.device.empty(slices * rows * columns, np.float32) if slices > 1 else self.no_floats
        product = self.device.function(source(plan.file), "product", plan.defines)
        sizes = map(np.int32, (rows, depth, plan.slice))
        product(plan.grid, plan.threads, x, w, dy, y, won, bias, out, db, winner, partial, *sizes)
        if slices > 1:
            outputs = -(-rows // (4 if shape.pooled and which == "forward" else 1)) * columns
            finish = self.device.function(source(plan.file), "finish", plan.defines)
            grid = (-(-outputs // FINISH_OUTPUTS), 1, 1)
            finish(grid, THREADS, partial, bias, out, db, winner, np.int32(rows), np.int32(slices))

    def max_pool_forward(self, x: Array, K: int, stride: int, pad: int) -> tuple[Array, Array]:
        """As on the CPU; winner is int32."""
        N, H, W, C = x.shape
        OH, OW = output_size(H, K, stride, pad), output_size(W, K, stride, pad)
        y = self.device.empty((N, OH, OW, C), np.float32)
        winner = self.device.empty(y.shape, np.int32)
        self.launch("layers", "max_pool_forward", y.size, x, y, winner, y.size, H, W, C, OH, OW, K, stride, pad)
        return y, winner

    def max_pool_backward(
        self, dy: Array, winner: Array, K: int, stride: int, pad: int, shape: tuple[int, ...]
    ) -> Array:
        """As on the CPU."""
        (_, H, W, C), (OH, OW) = shape, dy.shape[1:3]
        dx = self.device.empty(shape, np.float32)
        self.launch("layers", "max_pool_backward", dx.size, dy, winner, dx, dx.size, H, W, C, OH, OW, K, stride, pad)
        return dx

    def average_pool_forward(self, x: Array, K: int, stride: int, pad: int) -> Array:
        """As on the CPU."""
        N, H, W, C = x.shape
        OH, OW = output_size(H, K, stride, pad), output_size(W, K, stride, pad)
        y = self.device.empty((N, OH, OW, C), np.float32)
        self.launch("layers", "average_pool_forward", y.size, x, y, y.size, H, W, C, OH, OW, K, stride, pad)
        return y

    def average_pool_backward(self, dy: Array, K: int, stride: int, pad: int, shape: tuple[int, ...]) -> Array:
        """As on the CPU."""
        (_, H, W, C), (OH, OW) = shape, dy.shape[1:3]
        dx = self.device.empty(shape, np.float32)
        self.launch("layers", "average_pool_backward", dx.size, dy, dx, dx.size, H, W, C, OH, OW, K, stride, pad)
        return dx

    def pixel_mean(self, x: Array) -> Array:
        """As on the CPU; a warp of threads for each part of the pixels."""
        N, H, W, C = x.shape
        y = self.device.empty((N, C), np.float32)
        check_count("pixel_mean", x.size)
        self.launch("layers", "pixel_mean", PARTS_OF_PIXELS * y.size, x, y, y.size, H * W, C)
        return y

    def pixel_mean_backward(self, dy: Array, shape: tuple[int, ...]) -> Array:
        """As on the CPU."""
        (_, H, W, C), dx = shape, self.device.empty(shape, np.float32)
        self.launch("layers", "pixel_mean_backward", dx.size, dy, dx, dx.size, H * W, C)
        return dx

    def plus(self, x: Array, other: Array, relu: bool) -> Array:
        """As on the CPU."""
        return self._like(x, lambda y: self.launch("layers", "sum_of_two", x.size, x, other, y, int(relu), x.size))

    def join_channels(self, parts: Sequence[Array]) -> Array:
        """As on the CPU."""
        sizes = [part.shape[-1] for part in parts]
        y = self.device.empty((*parts[0].shape[:-1], sum(sizes)), np.float32)
        self._carry("join_channels", y, parts, sizes)
        return y

    def split_channels(self, x: Array, sizes: Sequence[int]) -> Sequence[Array]:
        """As on the CPU."""
        parts = [self.device.empty((*x.shape[:-1], size), np.float32) for size in sizes]
        self._carry("split_channels", x, parts, sizes)
        return parts

    def _carry(self, name: str, whole: Array, parts: Sequence[Array], sizes: Sequence[int]) -> None:
        """Between an array and the parts of its channels; each kernel takes the next SIDE_BY_SIDE of these."""
        first = 0
        for i in range(0, len(parts), SIDE_BY_SIDE):
            some, ends = list(parts[i : i + SIDE_BY_SIDE]), list(accumulate(sizes[i : i + SIDE_BY_SIDE]))
            missing = SIDE_BY_SIDE - len(some)
            count = math.prod(whole.shape[:-1]) * ends[-1]
            places = *some, *some[-1:] * missing, *ends, *ends[-1:] * missing
            self.launch("layers", name, count, whole, count, whole.shape[-1], first, *places)
            first += ends[-1]

    def relu(self, x: Array) -> Array:
        """As on the CPU."""
        return self._like(x, lambda y: self.launch("layers", "relu", x.size, x, y, x.size))

    def relu_backward(self, dy: Array, y: Array) -> Array:
        """As on the CPU."""
        return self._like(y, lambda dx: self.launch("layers", "relu_backward", y.size, dy, y, dx, y.size))

    def scale(self, x: Array, factor: float) -> Array:
        """As on the CPU."""
        return self._like(x, lambda y: self.launch("layers", "scale", x.size, x, factor, y, x.size))

    def dropout(self, x: Array, ratio: float, key: tuple[int, int], step: Array, samples: Array) -> Array:
        """As on the CPU, with the same random words. step (2,) uint32, lower half first; samples (N,) int32."""
        n, size = len(x), math.prod(x.shape[1:])
        words = np.uint64(round(ratio * 2**32)), np.uint32(key[0]), np.uint32(key[1])
        return self._like(x, lambda y: self.launch("layers", "dropout", x.size, x, y, *words, step, samples, n, size))

    def uniform(self, count: int, key: tuple[int, int], step: Array, samples: Array) -> Array:
        """As on the CPU, the same numbers."""
        y, words = self.device.empty((len(samples), count), np.float32), (np.uint32(key[0]), np.uint32(key[1]))
        self.launch("layers", "uniform", y.size, y, *words, step, samples, len(samples), count)
        return y

    def softmax_cross_entropy(
        self, scores: Array, labels: Array, batch: int = 1, smoothing: float = 0.0
    ) -> tuple[Array, Array]:
        """As on the CPU, labels (N,) int32; the loss is an array (1,) of float64."""
        n, classes = scores.shape
        dscores, loss = self.device.empty(scores.shape, np.float32), self.device.empty(1, np.float64)
        arguments = scores, labels, dscores, loss, float(batch), float(smoothing), n, classes
        self.launch("layers", "softmax_cross_entropy", 1, *arguments)  # one block
        return loss, dscores

    def warp(self, x: Array, numbers: Array, amounts: Sequence[float]) -> Array:
        """As on the CPU."""
        sizes = map(int, (x.size, *x.shape[1:]))
        return self._like(
            x, lambda y: self.launch("augmentation", "warp", x.size, x, numbers, y, *sizes, *map(float, amounts))
        )

    def mailbox(self, numbers: int, samples: int, sums: int) -> GpuMailbox:
        return GpuMailbox(self, numbers, samples, sums)

    def gather(self, images: Array, labels: Array, samples: Array) -> tuple[Array, Array]:
        """images (N, ...) of bytes or float32, labels (N, ...) int32, of the device, in one kernel."""
        x = self.device.empty((len(samples), *images.shape[1:]), np.float32)
        chosen = self.device.empty((len(samples), *labels.shape[1:]), np.int32)
        kind = "gather_bytes" if images.dtype == np.uint8 else "gather_floats"
        sizes = len(samples), math.prod(images.shape[1:]), math.prod(labels.shape[1:])
        self.launch("layers", kind, max(x.size, chosen.size), images, labels, samples, x, chosen, *sizes)
        return x, chosen

    def upload_labels(self, labels: Any) -> Array:
        return self.device.upload(labels.astype(np.int32))

    def update(self, rule: Any, p: Array, g: Array, state: Sequence[Array], numbers: Array, bad: Array) -> None:
        self.launch("updates", rule.kernel, p.size, p, g, *state, numbers[1:], bad[1:], p.size)

    def add(self, p: Array, g: Array, bad: Array) -> None:
        self.launch("updates", "add", p.size, p, g, bad[1:], p.size)

    def decay(self, p: Array, numbers: Array, bad: Array) -> None:
        self.launch("updates", "decay", p.size, p, numbers, bad[1:], p.size)

    def clip(self, gradients: Sequence[Array], most: float, bad: Array) -> None:
        """As on the CPU; the sums are of blocks of threads, and then of these."""
        blocks = [-(-g.size // THREADS) for g in gradients]
        squares = self.device.empty(sum(blocks), np.float64)
        for i, g in enumerate(gradients):
            self.launch("updates", "squares", g.size, g, squares[sum(blocks[:i]) :], g.size)
        for g in gradients:
            self.launch("updates", "clip", g.size, g, squares, sum(blocks), float(most), bad[1:], g.size)

    def squared_norm(self, gradient: Array) -> float:
        return math.nan

    def average(self, ema: Array, p: Array, share: Array, bad: Array) -> None:
        self.launch("updates", "average", p.size, ema, p, share, bad[1:], p.size)

    def checksum(self, vectors: Sequence[Array]) -> int:
        return 0  # the memory of a GPU in a cluster corrects itself (ECC); agree() compares what ranks hold

    def argmax(self, scores: Array) -> Any:
        """The class of the largest score of each row (N, F) -> (N,) int64, on the host."""
        best = self.device.empty(len(scores), np.int32)
        self.launch("layers", "argmax", len(scores), scores, best, *scores.shape)
        return self.device.download(best).astype(np.int64)


def _convolution(
    x: tuple[int, ...], w: tuple[int, ...], stride: int, pad: int, relu: bool, bias: Array | None
) -> Convolution:
    """Of these shapes, and with a bias where there is one, or its gradient."""
    (_, H, W, C), (K, _, _, F) = x, w
    return Convolution(H, W, C, F, K, stride, pad, relu, bias=bias is not None)
