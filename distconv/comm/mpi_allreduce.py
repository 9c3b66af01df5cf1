"""MPI's own Allreduce in place of our exchange: a variant to measure against, not one to train with.

Its float16 sum rounds at every hop and overflows where a sum exceeds 65504, and in MPICH 5.0 built by a compiler
without `_Float16` it is wrong without a word. So it is tried on every finite half before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from distconv.comm.exchange import HEADER, Headers, Refusal, header_bytes
from distconv.comm.shared_memory import closed
from distconv.comm.wire import Wire
from distconv.kernels.interface import Array

if TYPE_CHECKING:
    from mpi4py import MPI

SUMMED = ("float16", "float32", "float64", "int16", "int32")  # wires of plain numbers, for which MPI has types


class Library:
    """Allreduce on the wire's type, and an Allgather for the headers."""

    carrier = "mpi"
    how = "mpi, the library's own Allreduce"
    waited = 0.0

    def __init__(self, comm: MPI.Comm, size: int, wire: Wire, header: np.dtype[Any] = HEADER) -> None:
        """Raises ValueError, on all ranks alike, where the library cannot sum the wire's type."""
        if wire.name not in SUMMED:
            raise ValueError(f"MPI cannot sum what travels on {wire.name}; use one of {', '.join(SUMMED)} on the wire")
        if wire.name == "float16" and (problem := half_problem(comm)):
            raise ValueError(f"{problem}; use another exchange, or float32 on the wire")
        header_bytes(header)
        self.comm, self.wire, self.header = comm, wire, header
        self.ours, self.sums = np.zeros((2, size), wire.name)
        self.buffer_bytes = 2 * self.ours.nbytes
        self.bytes_sent = round(2 * (comm.size - 1) / comm.size * self.ours.nbytes)  # what a ring sends, not counted

    def close(self) -> None:
        self.ours = self.sums = np.zeros(0, self.ours.dtype)

    def sum(self, vector: Array, header: Headers, refused: Refusal | None = None) -> Headers:
        """See Exchange; halves are not scaled, so that what the library does with them can be seen."""
        if vector.size != self.ours.size:
            closed()
        self.wire.mark_bad(vector, header)
        gathered = np.zeros((self.comm.size, self.header.itemsize), np.uint8)
        self.comm.Allgather(np.frombuffer(header.tobytes(), np.uint8), gathered)
        headers: Headers = gathered.reshape(-1).view(self.header)
        if refused and refused(headers):
            return headers
        with np.errstate(over="ignore"):
            self.ours[...] = vector
        self.comm.Allreduce(self.ours, self.sums)
        vector[...] = self.sums
        return headers


def half_problem(comm: MPI.Comm) -> str | None:
    """What is wrong with the library's sum of halves, or None: every finite half plus another one; collective."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    contributions = [halves, np.roll(halves[::-1], 12345)]
    mine = contributions[comm.rank].copy() if comm.rank < 2 else np.zeros_like(halves)
    sums = np.empty_like(halves)
    try:
        comm.Allreduce(mine, sums)
    except (KeyError, NotImplementedError):  # mpi4py knows the type only if the library does
        return "this MPI has no type for halves"
    with np.errstate(over="ignore"):
        right = np.sum(contributions[: comm.size], axis=0, dtype=np.float64).astype(np.float16)
    wrong = int(np.count_nonzero(sums != right))
    worst = max(comm.allgather(wrong))
    return f"this MPI adds up {worst:,} of {len(halves):,} pairs of halves wrongly" if worst else None
