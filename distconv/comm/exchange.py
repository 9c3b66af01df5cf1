"""The sum of the ranks' gradients, the same bits on every rank, with any MPI.

Each rank owns one part of the vector. It sends every owner that owner's part, the owner adds up the P parts in rank
order, and sends the sum back to all. MPI carries bytes only: it needs no half type, and it does no arithmetic whose
order could differ between libraries or runs. A rank sends 2 (P-1)/P of the vector, what a ring allreduce sends, and
every number is rounded once on its way out and once on its way back, whatever P is. An owner's own contribution does
not travel and is not rounded.

Two carriers: `flat` does that among all ranks, through shared memory where they are all on one host. `two-level` first
adds up in float32, in shared memory, on each host, and then does it among the hosts: one message for each pair of hosts
and part of the vector, so that a host sends 2 (H-1)/H of the vector however many ranks it has.

A header with what the other ranks must know about this step rides along, so that no step needs another collective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distconv.comm.transport import SharedSpace, connect
from distconv.comm.wire import Wire
from distconv.kernels.half import BLOCK
from distconv.kernels.interface import Array

if TYPE_CHECKING:
    from mpi4py import MPI

# What a rank tells the others in a step. A structured NumPy scalar, so that it travels as bytes before the gradient.
HEADER = np.dtype(
    [
        ("step", np.int64),
        ("samples", np.int64),
        ("loss_sum", np.float64),
        ("bad_at", np.int64),  # where this rank's gradient first holds an infinity or NaN, or -1; filled in by sum
        ("stop", np.int64),  # 1: this rank was asked to stop
        ("save", np.int64),  # 1: this rank wants a state that may be saved
        ("checksum", np.uint64),  # of the parameters and the optimizer's state: all ranks hold the same
        ("changed", np.int64),  # 1: its parameters or the optimizer's state have changed between updates
        ("busy_seconds", np.float64),  # since the end of its last exchange: who is slow, and who waits
    ]
)
Headers = NDArray[Any]


class Exchange(Protocol):
    """Sums vectors of one size and dtype over ranks."""

    carrier: str  # its name
    wire: Wire
    how: str  # the same for people, with what it runs over
    bytes_sent: int  # by this rank in one sum, to other ranks

    def sum(self, vector: Array, header: Headers) -> Headers:
        """Replace vector by its sum over all ranks, the same bits on each. Returns the headers (P,) in rank order."""
        ...


class Flat:
    """Every rank exchanges with every rank. patient: waits without holding a core, beside another thread's work."""

    carrier = "flat"

    def __init__(self, comm: MPI.Comm, size: int, wire: Wire, patient: bool = False) -> None:
        self.rank, self.size, self.wire = comm.rank, comm.size, wire
        part = -(-size // (comm.size * BLOCK)) * BLOCK  # numbers that one rank owns; the last may own fewer
        self.parts = [slice(min(size, r * part), min(size, (r + 1) * part)) for r in range(comm.size)]
        nbytes = wire.nbytes(part)
        self.transport = connect(comm, HEADER.itemsize + nbytes, nbytes, patient)
        self.how = f"flat, {self.transport.name}"
        self.bytes_sent = (comm.size - 1) * (HEADER.itemsize + 2 * nbytes)

    def sum(self, vector: Array, header: Headers) -> Headers:
        """See Exchange; vector (size,) has the dtype of the wire."""
        return self.exchange(vector, header, is_own=True)

    def exchange(self, vector: Array, header: Headers, is_own: bool) -> Headers:
        """The same. is_own: the vector is this rank's contribution alone, so bad_at tells of it."""
        H, transport, wire = HEADER.itemsize, self.transport, self.wire
        own = vector[self.parts[self.rank]]
        finite = wire.first_bad(own) < 0
        for owner, message in enumerate(transport.outgoing):
            if owner != self.rank:
                finite &= wire.encode(vector[self.parts[owner]], message[H:])
        if is_own:
            header["bad_at"] = -1 if finite else wire.first_bad(vector)
        for message in transport.outgoing:
            message[:H].view(HEADER)[...] = header
        transport.scatter()

        received, first, stride = transport.received, transport.first, transport.stride
        headers = np.concatenate([received[first + r * stride :][:H] for r in range(self.size)]).view(HEADER)
        wire.sum_and_encode(own, self.rank, self.size, received, first + H, stride, transport.mine)
        transport.gather()

        for part, message in zip(self.parts, transport.gathered, strict=True):
            wire.decode(message, vector[part])
        return headers


class TwoLevel:
    """First the ranks of each host, in shared memory without rounding, then the hosts, each part by one rank of each.

    local: the ranks of this host. Every host has as many; raises ValueError where not.
    """

    carrier = "two-level"

    def __init__(self, comm: MPI.Comm, local: MPI.Comm, size: int, wire: Wire) -> None:
        L = local.size
        if len(set(comm.allgather(L))) > 1:
            raise ValueError("every host must have the same number of ranks")
        self.local_rank, self.wire = local.rank, wire
        across = comm.Split(local.rank)  # the ranks with this place on every host
        ranks = local.allgather(across.allgather(comm.rank))
        self.order = np.argsort(np.concatenate(ranks))  # from place and host to rank
        part = -(-size // (L * BLOCK)) * BLOCK
        self.part = slice(min(size, local.rank * part), min(size, (local.rank + 1) * part))
        self.inner = Flat(across, self.part.stop - self.part.start, wire)

        vector_bytes = -(-size * wire.dtype.itemsize // 64) * 64
        header_bytes = across.size * HEADER.itemsize
        space = SharedSpace.allocate(local, vector_bytes + header_bytes)
        if None in comm.allgather(space and space.rank) or space is None:
            raise ValueError("every host must have shared memory for the whole vector of each of its ranks")
        self.vectors = space.segments[:, :vector_bytes].view(wire.dtype)[:, :size]
        self.headers = space.segments[:, vector_bytes:][:, :header_bytes]
        self.barrier = space.barrier
        self.how = f"two-level, {across.size} hosts x {L} ranks, {self.inner.transport.name} between hosts"
        self.bytes_sent = self.inner.bytes_sent

    def sum(self, vector: Array, header: Headers) -> Headers:
        """See Exchange; vector (size,) has the dtype of the wire."""
        header["bad_at"] = self.wire.first_bad(vector)
        self.vectors[self.local_rank] = vector
        self.barrier()
        total = np.zeros(self.part.stop - self.part.start, self.wire.dtype)
        for other in self.vectors:
            total += other[self.part]
        headers = self.inner.exchange(total, header, is_own=False)
        self.headers[self.local_rank] = headers.view(np.uint8)
        self.barrier()  # nobody reads contributions any more
        self.vectors[0][self.part] = total
        self.barrier()
        vector[...] = self.vectors[0]
        everyone: Headers = np.concatenate(list(self.headers)).view(HEADER)[self.order]
        self.barrier()  # nobody reads the result any more
        return everyone
