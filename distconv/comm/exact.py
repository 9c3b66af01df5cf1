"""A sum with the same bits for any number of ranks: vectors cross the wire as whole numbers on a grid that all share.

A sum of floats hangs on who adds up what first, so a gradient of four ranks is not that of three. Here the vectors of
all ranks, V in all, are rounded to whole multiples of a step first (kernels/grid.py), and whole numbers add up the same
in any order: within a rank, within a host, by another MPI. To agree on the steps, ranks tell one another the largest of
each block of their vectors: two bytes for 256 numbers, before the sum itself, which any other exchange makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distconv.comm.exchange import Exchange, Headers, Refusal
from distconv.comm.shared_memory import closed
from distconv.comm.transport import connect
from distconv.comm.wire import WIRES, Wire
from distconv.kernels import grid, half
from distconv.kernels.interface import BLOCK, Array

if TYPE_CHECKING:
    from mpi4py import MPI


class WholeNumbers(Wire):
    """Integers as they are. Whoever made them has marked in the header what is not finite."""

    def mark_bad(self, x: Array, header: Any, finite: bool = False) -> None:
        pass

    def first_bad(self, x: Array) -> int:
        return -1


@dataclass(frozen=True)
class ExactWire(Wire):
    """float32 vectors as whole numbers, which Exact makes. contributions: V, the vectors of all ranks together."""

    numbers: WholeNumbers
    contributions: int = 1

    @property
    def factor(self) -> np.float32:
        return grid.factor(self.contributions, 8 * self.numbers.dtype.itemsize)

    def first_bad(self, x: Array) -> int:
        return int(half.first_bad(x))

    def round_trip(self, x: Array) -> Array:
        """What arrives of x (n,), if no other contribution has a larger number in a block."""
        peaks, total = np.empty(blocks(x.size), np.uint16), np.empty(x.size, self.numbers.dtype)
        arrived = np.empty_like(x)
        grid.peaks(x[None], peaks)
        grid.round_and_sum(x[None], peaks, self.factor, total)
        grid.widen(total, peaks, self.factor, arrived)
        return arrived

    def warm_up(self) -> None:
        """Call what a sum calls, so that it is compiled."""
        self.round_trip(np.zeros(BLOCK, np.float32))
        self.first_bad(np.zeros(BLOCK, np.float32))


class Exact:
    """Sums the vectors of all ranks, of which each has one or more. inner: sums their whole numbers."""

    def __init__(self, comm: MPI.Comm, size: int, wire: ExactWire, inner: Exchange) -> None:
        self.wire: Wire = wire
        self.size, self.inner, self.carrier = size, inner, inner.carrier
        self.factor = wire.factor
        self.transport = connect(comm, 0, 2 * blocks(size))
        self.total = np.zeros(size, wire.numbers.dtype)
        self.how = f"{inner.how}, in whole numbers"
        self.bytes_sent = inner.bytes_sent + (comm.size - 1) * len(self.transport.mine)
        self.buffer_bytes = inner.buffer_bytes + self.transport.buffer_bytes + self.total.nbytes

    @property
    def waited(self) -> float:
        return self.transport.waited + self.inner.waited

    def close(self) -> None:
        self.inner.close()
        self.transport.close()

    def sum(self, vector: Array, header: Headers, refused: Refusal | None = None) -> Headers:
        """See Exchange. vector: (size,), or (K, size) where this rank has K of them; the first becomes the sum."""
        if not self.transport.mine.size:
            closed()
        vectors = vector.reshape(-1, self.size)
        header["bad_at"] = self.find_peaks(vectors)
        self.transport.gather()
        peaks = np.maximum.reduce([gathered.view(np.uint16) for gathered in self.transport.gathered])
        self.encode(vectors, peaks)
        headers = self.inner.sum(self.total, header, refused)
        if not (refused and refused(headers)):
            self.decode(peaks, vectors[0])
        return headers

    def find_peaks(self, vectors: Array) -> int:
        """Write those of this rank's vectors (K, size) where the others find them; where one is not finite, or -1."""
        mine = self.transport.mine.view(np.uint16)
        grid.peaks(vectors, mine)
        finite = mine.max() < grid.NOT_FINITE
        bad = [] if finite else [first for one in vectors if (first := self.wire.first_bad(one)) >= 0]
        return min(bad, default=-1)

    def encode(self, vectors: Array, peaks: Array) -> None:
        """Make whole numbers of the vectors, by the peaks of all ranks, and add them up."""
        grid.round_and_sum(vectors, peaks, self.factor, self.total)

    def decode(self, peaks: Array, vector: Array) -> None:
        """Make the vector that the total stands for."""
        grid.widen(self.total, peaks, self.factor, vector)


def blocks(n: int) -> int:
    """How many blocks a vector (n,) has."""
    return -(-n // BLOCK)


def _wire(bits: int) -> ExactWire:
    name = f"int{bits}"
    return ExactWire(name, np.dtype(np.float32), WholeNumbers(name, np.dtype(name)))


EXACT_WIRES = {wire.name: wire for wire in (_wire(16), _wire(32))}
ALL_WIRES: dict[str, Wire] = WIRES | EXACT_WIRES
