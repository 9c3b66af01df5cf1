"""Who owns which sample: pure functions, the same on every rank, no communicator."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.kernels import philox

ORDER = 0xDA7A  # tells the draws of the epoch order from those of dropout, whose key holds a layer's name


def split(n: int, size: int, rank: int) -> slice:
    """The part of range(n) that rank owns among size ranks: contiguous, the first n % size one element longer."""
    share, rest = divmod(n, size)
    start = rank * share + min(rank, rest)
    return slice(start, start + share + (rank < rest))


def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order in which epoch `epoch` visits the n samples, each once."""
    return philox.permutation((seed, ORDER ^ epoch), n)


def batches(n: int, batch_size: int) -> int:
    """Steps of an epoch over n samples; the last may be smaller."""
    return -(-n // batch_size)


def shard(order: NDArray[np.int64], batch: int, batch_size: int, size: int, rank: int) -> NDArray[Any]:
    """The samples of batch number `batch` of an epoch that belong to rank; may be empty in the last batch."""
    samples = order[batch * batch_size : (batch + 1) * batch_size]
    return samples[split(len(samples), size, rank)]
