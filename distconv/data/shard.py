"""Who owns which sample: pure functions, the same on every rank, no communicator."""

from __future__ import annotations

import functools
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Shards:
    """How samples are dealt out: in `count` shards, of which a rank among `size` has one or more, side by side.

    Where nobody asks for more, each rank has one. What is computed shard by shard, and added up in their order, does
    not hang on the number of ranks.
    """

    count: int
    size: int
    rank: int

    @property
    def own(self) -> range:
        """The numbers of this rank's."""
        return range(self.count)[split(self.count, self.size, self.rank)]

    @property
    def most(self) -> int:
        """How many a rank has at most."""
        return -(-self.count // self.size)

    @functools.cached_property
    def places(self) -> tuple[list[int], list[int]]:
        """For each shard, the rank that has it, and which of that rank's it is."""
        ranks = [rank for rank in range(self.size) for _ in Shards(self.count, self.size, rank).own]
        return ranks, [shard - ranks.index(rank) for shard, rank in enumerate(ranks)]

    def sizes(self, n: int) -> list[int]:
        """How many of n samples each shard has."""
        share, rest = divmod(n, self.count)
        return [share + (shard < rest) for shard in range(self.count)]

    def part(self, n: int) -> slice:
        """Which of n samples are this rank's; may be none."""
        return slice(split(n, self.count, self.own.start).start, split(n, self.count, self.own.stop - 1).stop)

    def parts(self, n: int) -> list[slice]:
        """Which of these are those of each of its shards."""
        start = self.part(n).start
        slices = (split(n, self.count, shard) for shard in self.own)
        return [slice(part.start - start, part.stop - start) for part in slices]

    def samples(self, order: NDArray[np.int64], batch: int, batch_size: int) -> NDArray[np.int64]:
        """This rank's samples of batch number `batch` of an epoch; may be none in the last batch."""
        samples = order[batch * batch_size : (batch + 1) * batch_size]
        return samples[self.part(len(samples))]
