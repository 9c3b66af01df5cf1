"""The sum of the ranks' gradients, the same bits on every rank, with any MPI.

Each rank owns one part of the vector. It sends every owner that owner's part (all-to-all), the owner adds up the P
parts in rank order, and sends the sum back to all (all-gather). MPI carries bytes only: it needs no half type, and it
does no arithmetic whose order could differ between libraries or runs. A rank sends 2 (P-1)/P of the vector, what a ring
allreduce sends, and every number is rounded once on its way out and once on its way back, whatever P is. An owner's own
contribution does not travel and is not rounded.

A header with what the other ranks must know about this step rides along, so that no step needs another collective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from distconv.comm.half import BLOCK, Wire
from distconv.kernels.cpu import Array

if TYPE_CHECKING:
    from mpi4py import MPI

# What a rank tells the others in a step. A structured NumPy scalar, so that it travels as bytes beside the gradient.
HEADER = np.dtype(
    [
        ("step", np.int64),
        ("samples", np.int64),
        ("loss_sum", np.float64),
        ("finite", np.int64),  # 0: this rank's gradient holds an infinity or NaN
        ("stop", np.int64),  # 1: this rank was asked to stop
    ]
)


class Exchange:
    """Sums vectors of `size` numbers of one dtype over the ranks of a communicator."""

    def __init__(self, comm: MPI.Comm, size: int, wire: Wire, dtype: DTypeLike = np.float32) -> None:
        P = comm.size
        self.comm = comm
        self.wire = wire
        self.size = size
        self.part = -(-size // (P * BLOCK)) * BLOCK  # numbers that one rank owns
        self.padded: Array = np.zeros(P * self.part, dtype)
        part_bytes = wire.nbytes(self.part)
        self.outgoing = np.zeros((P, HEADER.itemsize + part_bytes), np.uint8)
        self.incoming = np.empty_like(self.outgoing)
        self.sums = np.empty((P, part_bytes), np.uint8)
        self.bytes_sent = (P - 1) * (HEADER.itemsize + 2 * part_bytes)  # by a rank, in one sum

    def sum(self, vector: Array, header: NDArray[Any]) -> NDArray[Any]:
        """Replace vector by its sum over all ranks. Returns the headers (P,) of all ranks."""
        H = HEADER.itemsize
        self.padded[: self.size] = vector
        parts = self.padded.reshape(-1, self.part)
        self.outgoing[:, :H] = np.frombuffer(header.tobytes(), np.uint8)
        for owner, part in enumerate(parts):
            if owner != self.comm.rank:
                self.wire.encode(part, self.outgoing[owner, H:])
        self.comm.Alltoall(self.outgoing, self.incoming)

        total = np.zeros(self.part, self.wire.sum_dtype)
        for rank, contribution in enumerate(self.incoming):
            total += parts[rank] if rank == self.comm.rank else self.wire.decode(contribution[H:])
        mine = np.empty_like(self.sums[0])
        self.wire.encode(total, mine)
        self.comm.Allgather(mine, self.sums)

        for owner, raw in enumerate(self.sums):
            self.padded[owner * self.part : (owner + 1) * self.part] = self.wire.decode(raw)
        vector[...] = self.padded[: self.size]
        return np.frombuffer(self.incoming[:, :H].tobytes(), HEADER)
