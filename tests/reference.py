"""What is right: slow loops in float64 and Python numbers, written from the formulas and from nothing in distconv.

Letters for shapes: N samples, H and W height and width, OH and OW the same of an output, C channels in, F filters,
K filter or window size. Gradients are named after their variable: dx, dw, db, dy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

Places = Iterator[tuple[tuple[int, int, int], tuple[int, slice, slice]]]
WORD = 2**32


def conv_forward(x, w, b, stride, pad):
    """x (N, H, W, C), w (K, K, C, F), b (F,) -> y (N, OH, OW, F)."""
    padded, K, F = _padded(x, pad, 0.0), w.shape[0], w.shape[3]
    y = np.zeros((*_grid(padded, K, stride), F))
    for out, window in _places(padded, K, stride):
        for f in range(F):
            y[out][f] = np.sum(padded[window] * w[..., f], dtype=np.float64) + b[f]
    return y


def conv_backward(x, w, dy, stride, pad):
    """x (N, H, W, C), w (K, K, C, F), dy (N, OH, OW, F) -> dx like x, dw like w, db (F,)."""
    padded, K, F = _padded(x, pad, 0.0), w.shape[0], w.shape[3]
    dpadded, dw, db = np.zeros(padded.shape), np.zeros(w.shape), np.zeros(F)
    for out, window in _places(padded, K, stride):
        for f in range(F):
            dpadded[window] += float(dy[out][f]) * w[..., f]
            dw[..., f] += float(dy[out][f]) * padded[window]
            db[f] += dy[out][f]
    return _cropped(dpadded, x, pad), dw, db


def max_pool_forward(x, K, stride, pad):
    """x (N, H, W, C) -> y (N, OH, OW, C)."""
    padded = _padded(x, pad, -np.inf)
    y = np.zeros((*_grid(padded, K, stride), x.shape[3]))
    for out, window in _places(padded, K, stride):
        y[out] = padded[window].max(axis=(0, 1))
    return y


def max_pool_backward(x, dy, K, stride, pad):
    """x (N, H, W, C), dy (N, OH, OW, C) -> dx like x; the first of equal elements, row by row, takes all of dy."""
    padded = _padded(x, pad, -np.inf)
    dpadded = np.zeros(padded.shape)
    for out, window in _places(padded, K, stride):
        for c in range(x.shape[3]):
            inside = padded[window][..., c]
            i, j = next(place for place in np.ndindex(K, K) if inside[place] == inside.max())
            dpadded[window][i, j, c] += dy[out][c]
    return _cropped(dpadded, x, pad)


def average_pool_forward(x, K, stride, pad):
    """x (N, H, W, C) -> y (N, OH, OW, C), zeros of the padding counted."""
    padded = _padded(x, pad, 0.0)
    y = np.zeros((*_grid(padded, K, stride), x.shape[3]))
    for out, window in _places(padded, K, stride):
        y[out] = padded[window].sum(axis=(0, 1)) / K**2
    return y


def average_pool_backward(x, dy, K, stride, pad):
    """x (N, H, W, C), dy (N, OH, OW, C) -> dx like x."""
    padded = _padded(x, pad, 0.0)
    dpadded = np.zeros(padded.shape)
    for out, window in _places(padded, K, stride):
        dpadded[window] += dy[out] / K**2
    return _cropped(dpadded, x, pad)


def norm_forward(x, gamma, beta, epsilon):
    """x (M, C), gamma, beta (C,) -> y (M, C), mean and variance (C,): algorithm 1 of Ioffe and Szegedy 2015."""
    y, (M, C) = np.zeros(x.shape), x.shape
    mean = np.array([math.fsum(x[:, c]) / M for c in range(C)])
    variance = np.array([math.fsum((float(n) - mean[c]) ** 2 for n in x[:, c]) / M for c in range(C)])
    for m, c in np.ndindex(M, C):
        y[m, c] = float(gamma[c]) * (float(x[m, c]) - mean[c]) / math.sqrt(variance[c] + epsilon) + float(beta[c])
    return y, mean, variance


def norm_backward(x, gamma, dy, epsilon):
    """x, dy (M, C), gamma (C,) -> dx (M, C), dgamma, dbeta (C,): the chain rule of their section 3, term by term."""
    dx, dgamma, dbeta, (M, C) = np.zeros(x.shape), np.zeros(x.shape[1]), np.zeros(x.shape[1]), x.shape
    _, mean, variance = norm_forward(x, gamma, np.zeros(C), epsilon)
    for c in range(C):
        deviation = math.sqrt(variance[c] + epsilon)
        gaps = [float(n) - mean[c] for n in x[:, c]]
        dscaled = [float(d) * float(gamma[c]) for d in dy[:, c]]
        dvariance = math.fsum(d * gap for d, gap in zip(dscaled, gaps, strict=True)) * -0.5 * deviation**-3
        dmean = -math.fsum(dscaled) / deviation + dvariance * -2 * math.fsum(gaps) / M
        for m in range(M):
            dx[m, c] = dscaled[m] / deviation + dvariance * 2 * gaps[m] / M + dmean / M
            dgamma[c] += float(dy[m, c]) * gaps[m] / deviation
            dbeta[c] += float(dy[m, c])
    return dx, dgamma, dbeta


def affine_forward(x, w, b):
    """x (N, C), w (C, F), b (F,) -> y (N, F)."""
    (N, C), F = x.shape, len(b)
    y = np.zeros((N, F))
    for n, f in np.ndindex(N, F):
        y[n, f] = math.fsum(float(x[n, c]) * float(w[c, f]) for c in range(C)) + b[f]
    return y


def affine_backward(x, w, dy):
    """x (N, C), w (C, F), dy (N, F) -> dx (N, C), dw (C, F), db (F,)."""
    dx, dw, db = np.zeros(x.shape), np.zeros(w.shape), np.zeros(w.shape[1])
    for n, f in np.ndindex(dy.shape):
        for c in range(x.shape[1]):
            dx[n, c] += float(dy[n, f]) * float(w[c, f])
            dw[c, f] += float(dy[n, f]) * float(x[n, c])
        db[f] += dy[n, f]
    return dx, dw, db


def softmax_cross_entropy(scores, labels, smoothing=0.0):
    """scores (N, F), labels (N,) -> sum of -log softmax(scores) weighted by the targets, and dscores (N, F).

    The target of a row is 1 - smoothing for its label, and smoothing / F for each of the F classes besides.
    """
    loss, dscores, F = 0.0, np.zeros(scores.shape), scores.shape[1]
    for n, label in enumerate(labels):
        row = [float(score) for score in scores[n]]
        # log(sum(exp(row))), with the largest taken out so that no exp overflows
        log_total = max(row) + math.log(math.fsum(math.exp(score - max(row)) for score in row))
        for f, score in enumerate(row):
            target = (1 - smoothing) * (f == label) + smoothing / F
            loss -= target * (score - log_total)
            dscores[n, f] = math.exp(score - log_total) - target
    return loss, dscores


def warp(x, numbers, amounts):
    """x (N, H, W, C), numbers (N, 10) from 0 to 1, seven amounts -> y like x, each image changed as its numbers say.

    Forward, in the order of words: about its middle, the image is turned (clockwise, if the angle is above 0) and made
    larger; it is moved down and to the right; it is mirrored. A pixel of y lies at a place of x that the inverse of all
    this gives, and a place sees the pixels of x less than 1 away, by tents; outside the image there is nothing.
    """
    y, (N, H, W, C) = np.zeros(x.shape), x.shape
    rotate, shift, scale, crop, flip, brightness, erase = amounts
    for n in range(N):
        turn, size, *moves, mirror, light, hole_h, hole_w = map(float, numbers[n])
        angle, larger = math.radians(rotate * (2 * turn - 1)), 1 + scale * (2 * size - 1)
        down, right = (
            shift * side * (2 * part - 1) + [*range(-int(crop), int(crop) + 1)][int(whole * (2 * crop + 1))]
            for side, part, whole in ((H, moves[0], moves[2]), (W, moves[1], moves[3]))
        )
        to_middle, back = np.eye(3), np.eye(3)
        to_middle[:2, 2], back[:2, 2] = (-(H - 1) / 2, -(W - 1) / 2), ((H - 1) / 2, (W - 1) / 2)
        turned = larger * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        changed = np.block([[turned, np.array([[down], [right]])], [np.array([[0.0, 0.0, 1.0]])]])
        mirrored = np.diag([1.0, -1.0 if flip and mirror < 0.5 else 1.0, 1.0])
        inverse = np.linalg.inv(back @ mirrored @ changed @ to_middle)
        for h, w in np.ndindex(H, W):
            side = erase * min(H, W)
            if 2 * abs(h + 0.5 - hole_h * H) < side and 2 * abs(w + 0.5 - hole_w * W) < side:
                continue
            at_h, at_w, _ = inverse @ (h, w, 1.0)
            for i, j, c in np.ndindex(H, W, C):
                tent = max(0.0, 1 - abs(at_h - i)) * max(0.0, 1 - abs(at_w - j))
                y[n, h, w, c] += (1 + brightness * (2 * light - 1)) * tent * float(x[n, i, j, c])
    return y


def sgd(p: float, gradients: Iterable[float], lr: float) -> Iterator[float]:
    """The parameter after each step; so are the five below."""
    for g in gradients:
        p = p - lr * g
        yield p


def momentum(p: float, gradients: Iterable[float], lr: float) -> Iterator[float]:
    v = 0.0
    for g in gradients:
        v = 0.9 * v - lr * g
        p = p + v
        yield p


def nesterov(p: float, gradients: Iterable[float], lr: float) -> Iterator[float]:
    v = 0.0
    for g in gradients:
        p = p + 0.9 * 0.9 * v - 1.9 * lr * g
        v = 0.9 * v - lr * g
        yield p


def adagrad(p: float, gradients: Iterable[float], lr: float) -> Iterator[float]:
    h = 0.0
    for g in gradients:
        h = h + g * g
        p = p - lr * g / (math.sqrt(h) + 1e-7)
        yield p


def rmsprop(p: float, gradients: Iterable[float], lr: float) -> Iterator[float]:
    h = 0.0
    for g in gradients:
        h = 0.99 * h + 0.01 * g * g
        p = p - lr * g / (math.sqrt(h) + 1e-7)
        yield p


def adam(p: float, gradients: Iterable[float], lr: float) -> Iterator[float]:
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        p = p - lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (math.sqrt(v) + 1e-7)
        yield p


def adamw(p: float, gradients: Iterable[float], rates: Iterable[float], decay: float) -> Iterator[float]:
    """adam with a rate for each step, by which the parameter first decays."""
    m = v = 0.0
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        corrected = lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        p = p - lr * decay * p - corrected * m / (math.sqrt(v) + 1e-7)
        yield p


OPTIMIZERS = {
    "sgd": sgd,
    "momentum": momentum,
    "nesterov": nesterov,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "adam": adam,
}


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 (Salmon et al., SC11): four counter words and two key words -> four random words."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, WORD)
        high1, low1 = divmod(0xCD9E8D57 * c2, WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return [c0, c1, c2, c3]


def _padded(x, pad, value):
    return np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=value)


def _cropped(dpadded, x, pad):
    return dpadded[:, pad : pad + x.shape[1], pad : pad + x.shape[2]]


def _grid(padded, K: int, stride: int) -> tuple[int, int, int]:
    """(N, OH, OW): a window may start wherever it ends within the padded image."""
    N, H, W, _ = padded.shape
    return N, len(range(0, H - K + 1, stride)), len(range(0, W - K + 1, stride))


def _places(padded, K: int, stride: int) -> Places:
    """Each place of an output, and the window of the padded input that it sees."""
    for n, i, j in np.ndindex(_grid(padded, K, stride)):
        yield (n, i, j), (n, slice(i * stride, i * stride + K), slice(j * stride, j * stride + K))


def half_wire(x: np.ndarray, block: int = 256) -> np.ndarray:
    """What arrives of x (n,) float32 over the float16 wire: a model of the format in float64 and exact powers of two.

    Of each block, the largest finite magnitude is brought into [2^14, 2^15) by a power of two not below 2^-126, every
    number is rounded to the nearest multiple of its half's last place, ties to even, and the power is undone.
    """
    arrived = np.empty(len(x), np.float64)
    for start in range(0, len(x), block):
        numbers = x[start : start + block].astype(np.float64)
        finite = np.isfinite(numbers)
        peak = np.abs(numbers[finite]).max(initial=0.0)
        power = max(math.frexp(peak)[1] - 15, -126) if peak > 0 else 0
        for i, number in enumerate(numbers):
            if not math.isfinite(number) or number == 0:
                arrived[start + i] = number
                continue
            scaled = math.ldexp(number, -power)
            place = max(math.frexp(scaled)[1] - 11, -24)  # halves have 11 bits, and none below 2^-24
            steps = round(math.ldexp(scaled, -place))  # Python rounds ties to even, and scaled is exact in float64
            arrived[start + i] = math.copysign(math.ldexp(steps, place + power), number)
    with np.errstate(over="ignore"):  # what rounds up to 2^128 is infinite
        return arrived.astype(np.float32)
