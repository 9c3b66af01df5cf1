"""The arithmetic on the CPU: compiled kernels for the shapes that networks mostly have, NumPy for all others.

In NumPy, convolution is a matrix product of image patches and filters (im2col, Chellapilla et al. 2006). The patches of
a whole batch would be nine times its size, so they are made for as many images as stay in a core's cache (PATCH_BYTES).

Every function takes float32 or float64 arrays and computes in their type, by NumPy's matrix product where it gets no
other. The forward ones take float16 arrays too, multiply them in float32, as tensor cores do, and store halves. A
gradient is named after its variable: dx, dw, db, dy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import DTypeLike, NDArray

from distconv.kernels import philox
from distconv.kernels.cpu.elementwise import relu_backward
from distconv.kernels.cpu.loss import softmax_cross_entropy as compiled_loss
from distconv.kernels.interface import SHUT, Array, output_size

Multiply = Callable[[Array, Array], Any]  # (M, K), (K, N) -> (M, N)
PATCH_BYTES = 1 << 20  # about a core's L2 cache; 0.5 to 4 MiB measured within a few per cent of each other


def _compute_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    return np.promote_types(dtype, np.float32)


def _patches(x: Array, K: int, stride: int, pad: int) -> Iterator[tuple[slice, Array]]:
    """Yield (images, patches) for a few images of x (N, H, W, C) at a time; patches are (n*OH*OW, K*K*C).

    The patches lie in one buffer that the next turn overwrites.
    """
    N, H, W, C = x.shape
    OH, OW = output_size(H, K, stride, pad), output_size(W, K, stride, pad)
    dtype = _compute_dtype(x.dtype)
    few = max(1, min(N, PATCH_BYTES // (OH * OW * K * K * C * dtype.itemsize)))
    padded = np.zeros((few, H + 2 * pad, W + 2 * pad, C), dtype)
    patches = np.empty((few, OH, OW, K, K * C), dtype)
    sn, sh, sw, sc = padded.strides
    # In a row of a patch, K pixels of C channels lie side by side: one run of K*C numbers to copy.
    windows = as_strided(padded, patches.shape, (sn, sh * stride, sw * stride, sh, sc), writeable=False)
    for start in range(0, N, few):
        images = slice(start, min(start + few, N))
        n = images.stop - start
        padded[:n, pad : pad + H, pad : pad + W] = x[images]
        np.copyto(patches[:n], windows[:n])
        yield images, patches[:n].reshape(n * OH * OW, K * K * C)


def conv_forward(
    x: Array, w: Array, b: Array | None, stride: int, pad: int, relu: bool, multiply: Multiply = np.matmul
) -> Array:
    """Convolution, bias and, if asked, ReLU: x (N, H, W, C), w (K, K, C, F), b (F,) or none -> y (N, OH, OW, F)."""
    if b is None:
        b = np.zeros(w.shape[3], w.dtype)
    if fast := _fast_road(x, w, stride, pad):
        found: Array = fast.conv_forward(x, w, b, stride, pad, relu)
        return found
    (N, H, W, _), (K, _, _, F) = x.shape, w.shape
    y = np.empty((N, output_size(H, K, stride, pad), output_size(W, K, stride, pad), F), x.dtype)
    filters = w.reshape(-1, F).astype(_compute_dtype(w.dtype), copy=False)
    for images, patches in _patches(x, K, stride, pad):
        product = multiply(patches, filters)
        product += b
        if relu:
            np.maximum(product, 0, out=product)
        y[images] = product.reshape(y[images].shape)
    return y


def conv_backward(
    x: Array, y: Array, dy: Array, w: Array, stride: int, pad: int, relu: bool, dw: Array, db: Array | None,
    wants_dx: bool, multiply: Multiply = np.matmul
) -> Array | None:  # fmt: skip
    """The adjoint of conv_forward: add to dw (K, K, C, F) and db (F,), return dx (N, H, W, C) if it is wanted.

    y (N, OH, OW, F) is what conv_forward returned for x and w, dy its gradient. db: None where there is no bias.
    """
    if db is None:
        db = np.zeros(w.shape[3], dw.dtype)
    if not relu:
        y = dy  # which is read anyway
    fast = _fast_road(x, w, stride, pad)
    if fast and not (wants_dx and x.shape[3] % 16):  # their dx has channels that fill vectors
        dx: Array | None = fast.conv_backward(x, y, dy, w, stride, pad, relu, dw, db, wants_dx)
        return dx
    if relu:
        dy = relu_backward(dy, y)
    conv_backward_filters(x, dy, stride, pad, dw, db, multiply)
    return conv_backward_input(dy, w, stride, pad, x.shape, multiply) if wants_dx else None


def conv_pool_forward(
    x: Array, w: Array, b: Array, stride: int, pad: int, relu: bool, multiply: Multiply = np.matmul
) -> tuple[Array, Array]:
    """conv_forward and then max_pool_forward of 2 x 2 windows side by side -> (y, winner), y (N, OH // 2, OW // 2, F).

    winner is SHUT where ReLU lets no gradient through.
    """
    if hasattr(fast := _fast_road(x, w, stride, pad), "conv_pool_forward"):
        found: tuple[Array, Array] = fast.conv_pool_forward(x, w, b, stride, pad, relu)
        return found
    y, winner = max_pool_forward(conv_forward(x, w, b, stride, pad, relu, multiply), 2, 2, 0)
    if relu:
        winner[y <= 0] = SHUT
    return y, winner


def conv_pool_backward(
    x: Array, winner: Array, dy: Array, w: Array, stride: int, pad: int, relu: bool, dw: Array, db: Array,
    wants_dx: bool, multiply: Multiply = np.matmul
) -> Array | None:  # fmt: skip
    """The adjoint of conv_pool_forward."""
    if hasattr(fast := _fast_road(x, w, stride, pad), "conv_pool_backward"):
        dx: Array | None = fast.conv_pool_backward(x, winner, dy, w, stride, pad, relu, dw, db, wants_dx)
        return dx
    (N, H, W, _), (K, _, _, F) = x.shape, w.shape
    shape = N, output_size(H, K, stride, pad), output_size(W, K, stride, pad), F
    dy = max_pool_backward(dy, winner, 2, 2, 0, shape)  # which has ReLU's zeros already
    return conv_backward(x, dy, dy, w, stride, pad, False, dw, db, wants_dx, multiply)


def _fast_road(x: Array, w: Array, stride: int, pad: int) -> Any:
    """The module of compiled kernels for such a convolution, or None. Numba is imported when it is first needed."""
    if takes_winograd(x, w, stride, pad):
        from distconv.kernels.cpu import winograd

        return winograd
    K, _, C, F = w.shape
    if not (x.dtype == w.dtype == np.float32 and F % 16 == 0):
        return None
    if K == 3 and stride == 1 and C == 1:
        from distconv.kernels.cpu import thin

        return thin
    from distconv.kernels.cpu import direct

    return direct


def takes_winograd(x: Array, w: Array, stride: int, pad: int) -> bool:
    """Whether winograd.py is the module for such a convolution."""
    K, _, C, F = w.shape
    if not (x.dtype == w.dtype == np.float32 and C % 16 == F % 16 == 0 and K == 3 and stride == 1):
        return False
    from distconv.kernels.cpu import winograd

    return winograd.pays(*(output_size(size, K, stride, pad) for size in x.shape[1:3]))


def conv_backward_filters(
    x: Array, dy: Array, stride: int, pad: int, dw: Array, db: Array, multiply: Multiply = np.matmul
) -> None:
    """Add the gradients dw (K, K, C, F) and db (F,) of a convolution of x (N, H, W, C) from dy (N, OH, OW, F)."""
    K, F = dw.shape[0], dw.shape[3]
    flat = dw.reshape(-1, F)
    for images, patches in _patches(x, K, stride, pad):
        flat += multiply(patches.T, dy[images].reshape(-1, F))
    db += dy.sum(axis=(0, 1, 2))


def conv_backward_input(
    dy: Array, w: Array, stride: int, pad: int, shape: tuple[int, ...], multiply: Multiply = np.matmul
) -> Array:
    """Gradient dx of the given shape (N, H, W, C) of a convolution from dy (N, OH, OW, F) and w (K, K, C, F).

    The adjoint of a convolution is a convolution of dy, spread out by the stride, with the filters turned round:
    dx[h] is the sum over j of spread[h + j] * w[K - 1 - j], where spread[stride * o + K - 1 - pad] = dy[o].
    """
    N, H, W, _ = shape
    K, F = w.shape[0], w.shape[3]
    spread = np.zeros((N, H + K - 1, W + K - 1, F), dy.dtype)
    to_h, from_h = _spread(dy.shape[1], stride, K - 1 - pad, H + K - 1)
    to_w, from_w = _spread(dy.shape[2], stride, K - 1 - pad, W + K - 1)
    spread[:, to_h, to_w] = dy[:, from_h, from_w]
    turned = np.ascontiguousarray(w[::-1, ::-1].transpose(0, 1, 3, 2))
    return conv_forward(spread, turned, np.zeros(w.shape[2], w.dtype), 1, 0, False, multiply)


def _spread(length: int, stride: int, first: int, room: int) -> tuple[slice, slice]:
    """Where the elements o < length with 0 <= stride * o + first < room go, and which of them they are."""
    start = max(0, -(first // stride))
    stop = max(start, min(length, -((first - room) // stride)))
    return slice(stride * start + first, max(0, stride * (stop - 1) + first + 1), stride), slice(start, stop)


def max_pool_forward(x: Array, K: int, stride: int, pad: int) -> tuple[Array, Array]:
    """Largest of each K x K window of x (N, H, W, C) -> y (N, OH, OW, C), and which of the K*K it was (uint8).

    The first of equal elements counts, and what is not a number above all others: it must not get lost. pad is below
    K, so that no window lies in the padding alone.
    """
    if _pools_fast(x.dtype, x.shape, K):
        from distconv.kernels.cpu import pooling

        return pooling.max_pool_forward(x, K, stride, pad)
    best, winner = None, None
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=-np.inf) if pad else x
    for i, window in enumerate(_window_offsets(padded, K, stride)):
        if best is None or winner is None:
            best, winner = window.copy(), np.zeros(window.shape, np.uint8 if K <= 16 else np.intp)
        else:
            larger = (window > best) | np.isnan(window)
            np.copyto(best, window, where=larger)
            np.copyto(winner, i, where=larger)
    assert best is not None and winner is not None
    return best, winner


def max_pool_backward(dy: Array, winner: Array, K: int, stride: int, pad: int, shape: tuple[int, ...]) -> Array:
    """Gradient dx of the given shape (N, H, W, C): each dy (N, OH, OW, C) goes to the element that won its window."""
    if _pools_fast(dy.dtype, shape, K):
        from distconv.kernels.cpu import pooling

        return pooling.max_pool_backward(dy, winner, K, stride, pad, shape)
    N, H, W, C = shape
    padded = np.zeros((N, H + 2 * pad, W + 2 * pad, C), dy.dtype)
    for i, window in enumerate(_window_offsets(padded, K, stride)):
        window += dy * (winner == i)
    return padded[:, pad : pad + H, pad : pad + W]


def average_pool_forward(x: Array, K: int, stride: int, pad: int) -> Array:
    """Mean of each K x K window of x (N, H, W, C), zeros of the padding counted -> y (N, OH, OW, C)."""
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))) if pad else x
    y: Array = sum(_window_offsets(padded, K, stride)) * x.dtype.type(1 / K**2)
    return y


def average_pool_backward(dy: Array, K: int, stride: int, pad: int, shape: tuple[int, ...]) -> Array:
    """The adjoint of average_pool_forward: dx of the given shape (N, H, W, C)."""
    N, H, W, C = shape
    padded, share = np.zeros((N, H + 2 * pad, W + 2 * pad, C), dy.dtype), dy * dy.dtype.type(1 / K**2)
    for window in _window_offsets(padded, K, stride):
        window += share
    return padded[:, pad : pad + H, pad : pad + W]


def pixel_mean(x: Array) -> Array:
    """Mean over the pixels of each image of x (N, H, W, C) -> (N, C)."""
    y: Array = x.mean(axis=(1, 2), dtype=_compute_dtype(x.dtype)).astype(x.dtype, copy=False)
    return y


def pixel_mean_backward(dy: Array, shape: tuple[int, ...]) -> Array:
    """The adjoint of pixel_mean: dy (N, C) -> dx of the given shape (N, H, W, C)."""
    dx = np.empty(shape, dy.dtype)
    dx[...] = dy[:, None, None] * dy.dtype.type(1 / (shape[1] * shape[2]))
    return dx


def _pools_fast(dtype: DTypeLike, shape: tuple[int, ...], K: int) -> bool:
    """Whether kernels.pooling can do such a pooling."""
    return dtype == np.float32 and shape[3] % 16 == 0 and K <= 16


def _window_offsets(x: Array, K: int, stride: int) -> Iterator[Array]:
    """For each of the K*K places in a window, the view (N, OH, OW, C) of x that lies there in all windows."""
    OH, OW = output_size(x.shape[1], K, stride, 0), output_size(x.shape[2], K, stride, 0)
    for i in range(K):
        for j in range(K):
            yield x[:, i : i + stride * OH : stride, j : j + stride * OW : stride]


def affine_forward(x: Array, w: Array, b: Array, relu: bool, multiply: Multiply = np.matmul) -> Array:
    """x (N, C) @ w (C, F) + b (F,) and, if asked, ReLU -> y (N, F)."""
    dtype = _compute_dtype(x.dtype)
    y: Array = multiply(x.astype(dtype, copy=False), w.astype(dtype, copy=False))
    y += b
    if relu:
        np.maximum(y, 0, out=y)
    return y.astype(x.dtype, copy=False)


def affine_backward(
    x: Array, y: Array, dy: Array, w: Array, relu: bool, dw: Array, db: Array, multiply: Multiply = np.matmul
) -> Array:
    """The adjoint of affine_forward, which returned y (N, F): add to dw (C, F) and db (F,), return dx (N, C)."""
    if relu:
        dy = relu_backward(dy, y)
    dw += multiply(x.T, dy)
    db += dy.sum(axis=0)
    dx: Array = multiply(dy, w.T)
    return dx


def dropout(x: Array, ratio: float, key: tuple[int, int], step: int, samples: NDArray[np.integer[Any]]) -> Array:
    """x (N, ...) with each number replaced by 0 with probability `ratio`; of a sample, key and step always the same."""
    flat = x.reshape(len(x), math.prod(x.shape[1:]))
    return philox.drop(flat, round(ratio * 2**32), key, step, samples).reshape(x.shape)


def softmax_cross_entropy(
    scores: Array, labels: NDArray[np.integer[Any]], batch: int = 1, smoothing: float = 0.0
) -> tuple[float, Array]:
    """Sum over the N rows of -log softmax(scores)[label], and its gradient divided by `batch`, dscores (N, F).

    scores (N, F), labels (N,) integers in [0, F). The loss is summed in float64. smoothing: so much of each label is
    spread evenly over all F (Szegedy et al. 2016, arXiv 1512.00567).
    """
    dscores = np.empty_like(scores)
    loss = float(
        compiled_loss(
            np.ascontiguousarray(scores), labels.astype(np.int64), *map(scores.dtype.type, (batch, smoothing)), dscores
        )
    )
    return loss, dscores


def uniform(count: int, key: tuple[int, int], step: int, samples: NDArray[np.integer[Any]]) -> Array:
    """Numbers from 0 to 1 of 24 random bits -> (N, count) float32; of a sample, key and step always the same."""
    words = philox.random_words(key, step, samples, count)
    return (words >> np.uint64(8)).astype(np.float32) * np.float32(2**-24)


def warp(x: Array, numbers: Array, amounts: Sequence[float]) -> Array:
    """x (N, H, W, C) with each image turned, shifted and so on, as its random numbers (N, DRAWS) say.

    amounts: the fields of data/augment.py's Augmentation, in their order.
    """
    from distconv.kernels.cpu import augmentation

    y = np.empty_like(x)
    augmentation.warp(np.ascontiguousarray(x), numbers, np.array(amounts, np.float64), y)
    return y


def pixels(images: Array, dtype: DTypeLike) -> Array:
    """Bytes 0 to 255 as numbers from 0 to 1; floats as they are."""
    if images.dtype.kind == "f":
        return images.astype(dtype, copy=False)
    return np.divide(images, 255, dtype=np.promote_types(dtype, np.float32)).astype(dtype, copy=False)
