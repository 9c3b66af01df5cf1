"""What the wire does to gradients and what float32 on it would cost: measured in a run, on a step now and then."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distconv.comm.exchange import HEADER, Exchange
from distconv.comm.futex import Barrier
from distconv.comm.half import WIRES
from distconv.kernels.cpu import Array
from distconv.kernels.half import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class WireHealth:
    """Of one step. wire_error: |sum - exact| / |exact|, exact being the sum on a float32 wire.

    largest_gradient: of the sum, in magnitude; flushed_share: of rank 0's numbers that are not 0 but were sent as 0.
    """

    largest_gradient: float
    flushed_share: float
    wire_error: float


class WireProbe:
    """Sums the gradients of a step once more on a float32 wire. connect makes that exchange when first needed."""

    def __init__(self, wire: str, connect: Callable[[], Exchange]) -> None:
        self.wire = WIRES[wire]
        self.connect = connect
        self.exact: Exchange | None = None
        self.seconds = float("nan")  # awake, of the exchange on a float32 wire, when last tried
        self.health = WireHealth(float("nan"), float("nan"), float("nan"))

    @property
    def fresh(self) -> bool:
        """Whether nothing was compared yet."""
        return self.exact is None

    def compare(self, contribution: Array, total: Array) -> None:
        """Measure on this rank's contribution (size,) and the sum (size,) that the run's own exchange made of all."""
        header = np.zeros((), HEADER)
        if self.exact is None:
            self.exact = self.connect()
            self.exact.sum(np.zeros_like(contribution), header)  # touches its memory
        flushed = self._flushed_share(contribution)
        began, asleep = time.perf_counter(), Barrier.asleep
        self.exact.sum(contribution, header)
        self.seconds = time.perf_counter() - began - (Barrier.asleep - asleep)
        with np.errstate(invalid="ignore", over="ignore"):
            norm = float(np.linalg.norm(contribution))
            error = float(np.linalg.norm(total - contribution)) / norm if norm else 0.0
            self.health = WireHealth(float(np.abs(total).max()), flushed, error)

    def _flushed_share(self, x: Array) -> float:
        message = np.zeros(self.wire.nbytes(-(-x.size // BLOCK) * BLOCK), np.uint8)
        arrived = np.empty_like(x)
        self.wire.encode(x, message)
        self.wire.decode(message, arrived)
        return float(np.count_nonzero((arrived == 0) & (x != 0)) / x.size)
