"""What the wire does to gradients, looked at after each epoch, and what float32 on it would cost, timed once.

Of a large gradient, a sample is enough, and takes no memory to speak of: whole blocks of the wire, evenly spread.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distconv.comm.exchange import HEADER, Exchange
from distconv.comm.wire import Wire
from distconv.kernels.cpu import updates
from distconv.kernels.interface import BLOCK, Array

if TYPE_CHECKING:
    from collections.abc import Callable


SAMPLE = 1 << 20  # numbers at most, a multiple of BLOCK
TRIES = 5  # of a sample's exchange: a disturbance would be scaled up with it


@dataclass(frozen=True)
class WireHealth:
    """Of one step. wire_error: |sum - exact| / |exact|, exact being the sum on a float32 wire.

    largest_gradient: of the sum, in magnitude; flushed_share: of rank 0's numbers that are not 0, those sent as 0.
    wire_error and flushed_share are those of the sample.
    """

    largest_gradient: float
    flushed_share: float
    wire_error: float


class WireProbe:
    """Sums gradients (size,), or samples of them, once more on a float32 wire, by an exchange that connect(n) makes.

    exact: in its place, for shards, whose sum must not hang on the ranks here either; then only the time is that of a
    float32 wire.
    """

    def __init__(
        self, wire: Wire, size: int, connect: Callable[[int], Exchange],
        exact: Callable[[int], Exchange] | None = None
    ) -> None:  # fmt: skip
        self.wire, self.size, self.floats = wire, size, connect(min(size, SAMPLE))
        self.exact = exact(min(size, SAMPLE)) if exact else self.floats
        self.seconds = float("nan")  # awake, of the exchange on a float32 wire, when last tried; see time
        self.health = WireHealth(float("nan"), float("nan"), float("nan"))

    def sample(self, vector: Array) -> Array:
        """A copy of what is compared of gradients (..., size): all, or SAMPLE numbers each in blocks as the wire's."""
        if self.size <= SAMPLE:
            return vector.copy()
        several = vector.shape[:-1]
        blocks = vector[..., : self.size // BLOCK * BLOCK].reshape(*several, -1, BLOCK)
        chosen = np.arange(SAMPLE // BLOCK) * blocks.shape[-2] // (SAMPLE // BLOCK)
        return blocks[..., chosen, :].reshape(*several, -1)

    def time(self) -> None:
        """Find out how long the exchange of a gradient takes on a float32 wire; collective.

        The median of some tries; of a sample, scaled up as if each of all the numbers took as long.
        """
        zeros = np.zeros(min(self.size, SAMPLE), self.wire.dtype)
        self._time(zeros)  # touches its memory
        tries = [self._time(zeros) for _ in range(TRIES)]
        self.seconds = statistics.median(tries) * self.size / zeros.size

    def compare(self, share: Array, total: Array) -> None:
        """Measure on the sample of this rank's share, and on the sum (size,) that the run's own exchange made.

        share: (m,), or (K, m) where this rank has several shards; the first is what is sent.
        """
        exact, first = share.copy(), share.reshape(-1, share.shape[-1])[0]
        some = first != 0
        flushed = float(np.mean(self.wire.round_trip(first)[some] == 0)) if some.any() else 0.0
        self.exact.sum(exact, np.zeros((), HEADER))
        exact = exact.reshape(-1, share.shape[-1])[0]
        with np.errstate(invalid="ignore", over="ignore"):
            norm = float(updates.norm(exact))
            error = float(updates.norm(self.sample(total) - exact)) / norm if norm else 0.0
            largest = abs(float(max(total.max(), -total.min())))
            self.health = WireHealth(largest, flushed, error)

    def _time(self, vector: Array) -> float:
        """The seconds that this rank is awake while vector is summed on a float32 wire."""
        began, waited = time.perf_counter(), self.floats.waited
        self.floats.sum(vector, np.zeros((), HEADER))
        return time.perf_counter() - began - (self.floats.waited - waited)
