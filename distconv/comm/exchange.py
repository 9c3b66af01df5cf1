"""The sum of the ranks' gradients, the same bits on every rank, with any MPI.

Each rank owns one part of the vector. It sends every owner that owner's part, the owner adds up the P parts in rank
order, and sends the sum back to all. MPI carries bytes only: it needs no half type, and it does no arithmetic whose
order could differ between libraries or runs. A rank sends 2 (P-1)/P of the vector, what a ring allreduce sends, and
every number is rounded once on its way out and once on its way back, whatever P is. An owner's own contribution does
not travel and is not rounded. A part is whole blocks of the wire: where these are fewer than the ranks, some ranks own
nothing, and are sent headers only.

Two carriers: `flat` does that among all ranks, through shared memory where they are all on one host. `two-level` first
adds up in float32, in shared memory, on each host, and then does it among the hosts: one message for each pair of hosts
and part of the vector, so that a host sends 2 (H-1)/H of the vector however many ranks it has.

A header with what the other ranks must know about this step rides along, so that no step needs another collective. Its
fields are up to whoever makes the exchange, but for bad_at (int64), which sum fills in, and step (int64), on which the
random numbers of a wire that rounds at random hang; HEADER is a training step's.

An exchange works on any communicator, and must be closed to give back what it has allocated: MPI's windows and
communicators are not freed by Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distconv.comm.shared_memory import closed, share
from distconv.comm.transport import connect, segments
from distconv.comm.wire import ALIGNMENT, Wire, random_key
from distconv.kernels.interface import BLOCK, Array

if TYPE_CHECKING:
    from mpi4py import MPI

MOST_SUMS = 4


def step_header(shards: int = 1) -> np.dtype[Any]:
    """What a rank tells the others in a training step, where no rank has more shards of the batch than these.

    A structured NumPy scalar, so that it travels as bytes before the gradient.
    """
    return np.dtype(
        [
            ("step", np.int64),
            ("samples", np.int64),
            ("sums", np.float64, (shards, MOST_SUMS)),  # of what the task learns, over a shard: the loss first
            ("squares", np.float64, (shards,)),  # the squared norm of a shard's gradient, NaN where it is not known
            ("bad_at", np.int64),  # where this rank's gradient first holds an infinity or NaN, or -1; filled in by sum
            ("stop", np.int64),  # 1: this rank was asked to stop
            ("save", np.int64),  # 1: this rank wants a state that may be saved
            ("checksum", np.uint64),  # of the parameters and the optimizer's state: all ranks hold the same
            ("changed", np.int64),  # 1: its parameters or the optimizer's state have changed between updates
            ("busy_seconds", np.float64),  # since the end of its last exchange: who is slow, and who waits
        ]
    )


HEADER = step_header()
Headers = NDArray[Any]
Refusal = Callable[[Headers], bool]


class Exchange(Protocol):
    """Sums vectors of one size and dtype over ranks."""

    carrier: str  # its name
    wire: Wire
    how: str  # the same for people, with what it runs over
    bytes_sent: int  # by this rank in one sum, to other ranks
    buffer_bytes: int  # of its own memory and of what ranks share, that this rank writes or reads

    @property
    def waited(self) -> float:
        """Seconds that this rank has slept in barriers, in all sums together."""
        ...

    def sum(self, vector: Array, header: Headers, refused: Refusal | None = None) -> Headers:
        """Replace vector by its sum over all ranks, the same bits on each. Returns the headers (P,) in rank order.

        vector: (size,), contiguous, of the wire's dtype; this is not checked. exact.py takes several of them. refused:
        is given the headers before vector changes, and must say the same on all ranks; where it says so, vector stays
        as it is.
        """
        ...

    def close(self) -> None:
        """Give back what was allocated; collective. Does nothing the second time."""
        ...


def part_size(size: int, count: int) -> int:
    """Numbers that one of `count` owners has of a vector (size,): whole blocks of the wire. The last may have fewer."""
    return -(-size // (count * BLOCK)) * BLOCK


def parts(size: int, count: int) -> list[slice]:
    """The part of each owner."""
    part = part_size(size, count)
    return [slice(min(size, r * part), min(size, (r + 1) * part)) for r in range(count)]


def owners(size: int, count: int) -> int:
    """How many of `count` ranks, the first, have a part: with fewer blocks than ranks, the others have nothing."""
    return -(-size // max(part_size(size, count), 1))


def bytes_sent(rank: int, count: int, owners: int, header: int, part: int) -> int:
    """By one of `count` ranks: a header to each other one, with its part if it owns one, and the own part to all."""
    has_part = rank < owners
    return (count - 1) * (header + part * has_part) + part * (owners - has_part)


def header_bytes(header: np.dtype[Any]) -> int:
    """Room for a header before a message. Raises ValueError for one without the fields that an exchange uses."""
    if not {"step", "bad_at"} <= set(header.names or ()):
        raise ValueError(f"a header must be a structured dtype with fields step and bad_at of int64, not {header}")
    return -(-header.itemsize // ALIGNMENT) * ALIGNMENT


class Flat:
    """Every rank exchanges with every rank. patient: waits without holding a core, beside another thread's work.

    seed: of a wire that rounds at random; place: where the vector lies in the gradient, should it be a part of one.
    """

    carrier = "flat"

    def __init__(
        self, comm: MPI.Comm, size: int, wire: Wire, patient: bool = False, header: np.dtype[Any] = HEADER,
        seed: int = 0, place: int = 0
    ) -> None:  # fmt: skip
        self.rank, self.size, self.wire, self.header = comm.rank, comm.size, wire, header
        self.seed, self.place = seed, place
        self.parts = parts(size, comm.size)
        self.header_bytes, nbytes = header_bytes(header), wire.nbytes(part_size(size, comm.size))
        have_part = owners(size, comm.size)
        self.transport = connect(comm, self.header_bytes, nbytes, patient, have_part)
        self.how = f"flat, {self.transport.name}"
        self.bytes_sent = bytes_sent(comm.rank, comm.size, have_part, self.header_bytes, nbytes)
        self.buffer_bytes = self.transport.buffer_bytes
        H, transport = header.itemsize, self.transport
        self.heads = [message[:H].view(header) for message in transport.outgoing]  # where this rank's header goes
        self.bodies = [message[self.header_bytes :] for message in transport.outgoing]
        starts = range(transport.first, transport.first + comm.size * transport.stride, transport.stride)
        self.arrived = [transport.received[start:][:H] for start in starts]  # where the others' headers come

    @property
    def waited(self) -> float:
        return self.transport.waited

    def close(self) -> None:
        self.heads, self.bodies, self.arrived = [], [], []  # what lies in memory that is no more must not be read
        self.transport.close()

    def sum(self, vector: Array, header: Headers, refused: Refusal | None = None) -> Headers:
        """See Exchange."""
        return self.exchange(vector, header, is_own=True, refused=refused)

    def exchange(self, vector: Array, header: Headers, is_own: bool, refused: Refusal | None = None) -> Headers:
        """The same. is_own: the vector is this rank's contribution alone, so bad_at tells of it."""
        transport, wire, step = self.transport, self.wire, int(header["step"])
        own = vector[self.parts[self.rank]]
        finite = wire.first_bad(own) < 0
        for owner, body in enumerate(self.bodies):
            if owner != self.rank:
                part = self.parts[owner]
                finite &= wire.encode(vector[part], body, self._key(step, self.rank, part))
        if is_own:
            wire.mark_bad(vector, header, finite)
        for head in self.heads:
            head[...] = header
        transport.scatter()

        headers = np.concatenate(self.arrived).view(self.header)
        if refused and refused(headers):
            transport.gather()  # until all have read the headers
            return headers
        first = transport.first + self.header_bytes
        key = self._key(step, self.size, self.parts[self.rank])  # as if the sum were one more rank's contribution
        wire.sum_and_encode(own, self.rank, self.size, transport.received, first, transport.stride, transport.mine, key)
        transport.gather()

        for part, message in zip(self.parts, transport.gathered, strict=True):
            wire.decode(message, vector[part])
        return headers

    def _key(self, step: int, sender: int, part: slice) -> int:
        return random_key(self.seed, step, sender, self.place + part.start)


class TwoLevel:
    """First the ranks of each host, in shared memory without rounding, then the hosts, each part by one rank of each.

    local: the ranks of this host; close frees it. Every host has as many ranks. Raises ValueError, on all ranks alike,
    where not, or where a host has no shared memory for it; local is then still the caller's.
    """

    carrier = "two-level"

    def __init__(
        self, comm: MPI.Comm, local: MPI.Comm, size: int, wire: Wire, header: np.dtype[Any] = HEADER, seed: int = 0
    ) -> None:
        L = local.size
        vector_bytes = -(-size * wire.dtype.itemsize // 64) * 64
        if len(set(comm.allgather(L))) > 1:
            raise ValueError("every host must have the same number of ranks")
        space = share(local, vector_bytes + comm.size // L * header.itemsize)
        if None in comm.allgather(space and space.rank) or space is None:
            if space:
                space.close()
            raise ValueError("every host must have shared memory for the whole vector of each of its ranks")
        across = comm.Split(local.rank)  # the ranks with this place on every host
        ranks = local.allgather(across.allgather(comm.rank))
        self.order = np.argsort(np.concatenate(ranks))  # from place and host to rank
        self.local_rank, self.wire, self.header = local.rank, wire, header
        self.part = parts(size, L)[local.rank]
        self.inner = Flat(across, self.part.stop - self.part.start, wire, False, header, seed, self.part.start)

        self.space, self.owned = space, [across, local]
        whole = segments(space)
        self.vectors = whole[:, :vector_bytes].view(wire.dtype)[:, :size]
        self.headers = whole[:, vector_bytes:][:, : across.size * header.itemsize]
        self.how = f"two-level, {across.size} hosts x {L} ranks, {self.inner.transport.name} between hosts"
        self.bytes_sent = self.inner.bytes_sent
        # Its own vector, the others' numbers in its part, and the first rank's vector, where the sum is.
        self.buffer_bytes = self.inner.buffer_bytes + (3 * L - 2) * vector_bytes // L

    @property
    def waited(self) -> float:
        return self.space.waited + self.inner.waited

    def close(self) -> None:
        self.vectors = np.zeros((0, 0), self.wire.dtype)  # what lies in memory that is no more must not be read
        self.headers = np.zeros((0, 0), np.uint8)
        self.inner.close()
        self.space.close()
        while self.owned:
            self.owned.pop(0).Free()

    def sum(self, vector: Array, header: Headers, refused: Refusal | None = None) -> Headers:
        """See Exchange."""
        if not self.owned:
            closed()
        self.wire.mark_bad(vector, header)
        self.vectors[self.local_rank] = vector
        barrier = self.space.barrier
        barrier()
        total = self.sum_of_host()
        headers = self.inner.exchange(total, header, is_own=False)
        self.headers[self.local_rank] = headers.view(np.uint8)
        barrier()  # nobody reads contributions any more
        self.vectors[0][self.part] = total
        barrier()
        everyone: Headers = np.concatenate(list(self.headers)).view(self.header)[self.order]
        if not (refused and refused(everyone)):
            vector[...] = self.vectors[0]
        barrier()  # nobody reads the result any more
        return everyone

    def sum_of_host(self) -> Array:
        """The numbers that this rank sums between hosts, added up in the order of this host's ranks."""
        total = np.zeros(self.part.stop - self.part.start, self.wire.dtype)
        for other in self.vectors:
            total += other[self.part]
        return total
