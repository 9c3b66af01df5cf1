"""Random numbers that belong to a sample, not to a rank: the counter-based generator Philox4x32-10.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11. A number is a function of a key and a
counter, so any rank, and later any GPU thread, draws the number of any sample without drawing those before it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.kernels.compiled import compiled

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_ROUNDS = 10
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)  # bits


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Ten rounds of Philox over counters (4, M) of 32-bit words held in uint64 -> random words, same shape."""
    words = np.empty_like(counter)
    _rounds(counter, np.uint64(key[0]), np.uint64(key[1]), words)
    return words


@compiled
def _rounds(counter: Any, k0: Any, k1: Any, words: Any) -> None:
    for i in range(counter.shape[1]):
        c0, c1, c2, c3 = counter[0, i], counter[1, i], counter[2, i], counter[3, i]
        a, b = k0, k1
        for _ in range(_ROUNDS):
            p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
            c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ a, p1 & _WORD, (p0 >> _HALF) ^ c3 ^ b, p0 & _WORD
            a, b = (a + _KEY_STEPS[0]) & _WORD, (b + _KEY_STEPS[1]) & _WORD
        words[0, i], words[1, i], words[2, i], words[3, i] = c0, c1, c2, c3


def drop(
    x: NDArray[Any], threshold: int, key: tuple[int, int], step: int, samples: NDArray[np.integer[Any]]
) -> NDArray[Any]:
    """x (N, size) times 1 where the word of random_words(key, step, samples, size) is at least `threshold`, else 0."""
    y = np.empty_like(x)
    words = np.uint64(step & int(_WORD)), np.uint64(step >> 32), np.uint64(key[0]), np.uint64(key[1])
    _drop(np.ascontiguousarray(x), np.uint64(threshold), *words, np.asarray(samples, np.uint64), y)
    return y


@compiled
def _drop(x: Any, threshold: Any, low: Any, high: Any, k0: Any, k1: Any, samples: Any, y: Any) -> None:
    N, size = x.shape
    blocks = (size + 3) // 4
    counter, words = np.empty((4, blocks), np.uint64), np.empty((4, blocks), np.uint64)
    for n in range(N):
        for block in range(blocks):
            counter[0, block], counter[1, block] = np.uint64(block), samples[n]
            counter[2, block], counter[3, block] = low, high
        _rounds(counter, k0, k1, words)
        for i in range(size):
            kept = words[i % 4, i // 4] >= threshold
            y[n, i] = x[n, i] * x.dtype.type(kept)


def random_words(key: tuple[int, int], step: int, samples: NDArray[np.integer[Any]], count: int) -> NDArray[np.uint64]:
    """`count` random 32-bit words for each of the N global sample indices at a step -> (N, count)."""
    blocks = -(-count // 4)  # a counter gives four words
    counter = np.empty((4, len(samples), blocks), np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    counter[1] = np.asarray(samples, np.uint64)[:, None]
    counter[2] = step & int(_WORD)
    counter[3] = step >> 32
    words = philox4x32(counter.reshape(4, -1), key).reshape(counter.shape)
    return words.transpose(1, 2, 0).reshape(len(samples), 4 * blocks)[:, :count]


def permutation(key: tuple[int, int], n: int) -> NDArray[np.int64]:
    """A random order of range(n): the indices sorted by 64 random bits each, the same on every machine and NumPy."""
    words = random_words(key, 0, np.arange(n), 2)
    return np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable").astype(np.int64)
