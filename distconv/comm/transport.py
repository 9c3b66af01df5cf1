"""Two ways of bringing bytes from every rank to every rank: MPI's messages, and memory that the ranks of a host share.

Both have the same form. A rank writes one message for each rank into `outgoing`; after `scatter`, the messages of the
others to this rank lie in `received`, `stride` bytes apart from `first` on. It writes one message for all into `mine`;
after `gather`, those of the ranks lie in `gathered`. Each is a barrier, so buffers can be used again step after step.
`waited`: seconds that this rank slept in them; `buffer_bytes`: those that it writes or reads. `close` is collective and
gives the buffers back; after it, `scatter` raises RuntimeError.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from distconv.comm.shared_memory import SharedSpace, closed, share
from distconv.comm.wire import Bytes

if TYPE_CHECKING:
    from mpi4py import MPI

SECONDS_BETWEEN_LOOKS = 2e-4  # 25 kB at 1 Gbit/s


class Messages:
    """MPI carries bytes: an all-to-all and an all-gather, with any MPI, over any network."""

    name = "messages"
    waited = 0.0

    def __init__(
        self, comm: MPI.Comm, header_bytes: int, part_bytes: int, patient: bool = False, owners: int | None = None
    ) -> None:
        """Room for messages of a header and a part to each rank, and for one of a part to all.

        patient: sleeps between looks at what has come. MPI's own waiting holds a core, which then lacks to a thread
        that computes. owners: so many ranks, the first, have parts (None: all); to the others only headers travel, and
        nothing comes from them in gather.
        """
        P, outgoing_bytes = comm.size, header_bytes + part_bytes
        self.comm = comm
        self.patient = patient
        self.outgoing: list[Bytes] = list(np.zeros((P, outgoing_bytes), np.uint8))
        self.received: Bytes = np.zeros(P * outgoing_bytes, np.uint8)
        self.first, self.stride = 0, outgoing_bytes
        self.mine: Bytes = np.zeros(part_bytes, np.uint8)
        self.gathered: list[Bytes] = list(np.zeros((P, part_bytes), np.uint8))
        self.buffer_bytes = (2 * P - 1) * outgoing_bytes + (P + 1) * part_bytes  # what is its own is not sent
        if P == 1:  # MPI would only copy
            self.received, self.gathered, self.buffer_bytes = self.outgoing[0], [self.mine], outgoing_bytes
        self.lengths: list[int] | None = None  # of the parts, where some ranks have none
        if owners is not None and owners < P:
            self.lengths = [part_bytes] * owners + [0] * (P - owners)
            self.to = [header_bytes + length for length in self.lengths]
            self.come = [header_bytes + self.lengths[comm.rank]] * P
            self.places, self.parts = [outgoing_bytes * rank for rank in range(P)], [part_bytes * r for r in range(P)]

    def scatter(self) -> None:
        if not self.outgoing:
            closed()
        if self.comm.size == 1:
            return
        outgoing: Any = self.outgoing[0].base
        received: Any = self.received
        if self.lengths is None:
            call = self.comm.Ialltoall if self.patient else self.comm.Alltoall
        else:
            call = self.comm.Ialltoallv if self.patient else self.comm.Alltoallv
            outgoing, received = (outgoing, (self.to, self.places)), (received, (self.come, self.places))
        self._wait(call(outgoing, received))

    def gather(self) -> None:
        if self.comm.size == 1:
            return
        mine: Any = self.mine
        gathered: Any = self.gathered[0].base
        if self.lengths is None:
            call = self.comm.Iallgather if self.patient else self.comm.Allgather
        else:
            call = self.comm.Iallgatherv if self.patient else self.comm.Allgatherv
            mine, gathered = mine[: self.lengths[self.comm.rank]], (gathered, (self.lengths, self.parts))
        self._wait(call(mine, gathered))

    def close(self) -> None:
        self.outgoing, self.gathered = [], []
        self.received = self.mine = np.zeros(0, np.uint8)

    def _wait(self, request: MPI.Request | None) -> None:
        """Until what was begun has come; None: it has."""
        while request is not None and not request.Test():
            time.sleep(SECONDS_BETWEEN_LOOKS)


class SharedMemory:
    """The ranks of one host read each other's messages where they were written; nothing is copied."""

    name = "shared memory"

    def __init__(self, space: SharedSpace, header_bytes: int, part_bytes: int) -> None:
        P, whole, outgoing_bytes = space.ranks, segments(space), header_bytes + part_bytes
        messages = whole[:, : P * outgoing_bytes].reshape(P, P, outgoing_bytes)
        self.outgoing: list[Bytes] = list(messages[space.rank])
        self.received: Bytes = whole.reshape(-1)
        self.first, self.stride = space.rank * outgoing_bytes, whole.shape[1]
        self.gathered: list[Bytes] = list(whole[:, P * outgoing_bytes :][:, :part_bytes])
        self.mine = self.gathered[space.rank]
        self.buffer_bytes = 2 * (P - 1) * outgoing_bytes + P * part_bytes
        self.scatter: Callable[[], None] = space.barrier
        self.gather: Callable[[], None] = space.barrier
        self.space = space

    @property
    def waited(self) -> float:
        return self.space.waited

    def close(self) -> None:
        self.scatter = self.gather = closed
        self.outgoing, self.gathered = [], []  # what lies in memory that is no more must not be read
        self.received = self.mine = np.zeros(0, np.uint8)
        self.space.close()


def segments(space: SharedSpace) -> Bytes:
    """The memory as (P, nbytes), one segment each rank's own. Must not be used once the space is closed."""
    return np.frombuffer(space.memory, np.uint8).reshape(space.ranks, -1)


def connect(
    comm: MPI.Comm, header_bytes: int, part_bytes: int, patient: bool = False, owners: int | None = None
) -> Messages | SharedMemory:
    """Shared memory where all ranks are on one host that has room for it, else messages; collective. See Messages."""
    space = share(comm, comm.size * (header_bytes + part_bytes) + part_bytes) if comm.size > 1 else None
    if space:
        return SharedMemory(space, header_bytes, part_bytes)
    return Messages(comm, header_bytes, part_bytes, patient, owners)
