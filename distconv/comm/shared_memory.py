"""Memory that the ranks of one host share, and a barrier in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distconv.comm.barrier import Barrier
from distconv.process.time_slices import cores_are_oversubscribed

if TYPE_CHECKING:
    from mpi4py import MPI

CACHE_LINE = 64  # bytes


class SpinningBarrier:
    """MPI's own barrier, whose ranks do not sleep."""

    waited = 0.0

    def __init__(self, comm: MPI.Comm, window: MPI.Win) -> None:
        self.comm, self.window = comm, window

    def __call__(self) -> None:
        self.window.Sync()
        self.comm.Barrier()
        self.window.Sync()


class SharedSpace:
    """Memory that P ranks of one host see: bytes, as many for each of them, one rank's behind the other's.

    After barrier(), all ranks see what each of them has written before. waited: seconds that this rank slept in it.
    """

    def __init__(self, comm: MPI.Comm, window: MPI.Win, memory: memoryview, barrier: Barrier | SpinningBarrier) -> None:
        self.rank, self.ranks, self.window, self.memory = comm.rank, comm.size, window, memory
        self.barrier: Callable[[], None] = barrier
        self.counter = barrier

    @property
    def waited(self) -> float:
        return self.counter.waited

    def close(self) -> None:
        """Give the memory back; collective. Whoever has views of it must not use them any more."""
        if self.barrier is not closed:
            self.memory, self.barrier = memoryview(b""), closed
            self.window.Unlock_all()
            self.window.Free()


def closed() -> NoReturn:
    """Stands where a barrier was."""
    raise RuntimeError("this exchange is closed, and sums no more: make another one")


def mpi_of(comm: MPI.Comm) -> Any:
    """mpi4py's module. Who has a communicator has imported it; to import it here might set how it starts MPI."""
    return sys.modules["mpi4py.MPI"]


def share(comm: MPI.Comm, nbytes: int) -> SharedSpace | None:
    """Memory that the ranks of one host share, nbytes or a little more for each of them; collective over comm.

    None where the ranks are not on one host with room for it.
    """
    MPI, nbytes = mpi_of(comm), -(-nbytes // CACHE_LINE) * CACHE_LINE
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    # Containers often have a small /dev/shm, and to write beyond its end is a bus error, not an exception.
    store = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    room = store is None or store.f_bavail * store.f_frsize > 1.5 * nbytes * comm.size
    fits = comm.allreduce(local.size == comm.size and room, MPI.LAND)
    local.Free()
    if not fits:
        return None
    # The standard puts the parts of the ranks one behind the other; the words of the barrier follow the last one.
    last = comm.rank == comm.size - 1
    window = MPI.Win.Allocate_shared(nbytes + (Barrier.nbytes(comm.size) if last else 0), 1, comm=comm)
    window.Lock_all()
    start, _ = window.Shared_query(0)
    memory = memoryview(MPI.buffer.fromaddress(start.address, nbytes * comm.size + Barrier.nbytes(comm.size)))
    memory, words = memory[: nbytes * comm.size], memory[nbytes * comm.size :]
    if last:
        words[:] = bytes(len(words))
    barrier: Barrier | SpinningBarrier = SpinningBarrier(comm, window)
    # MPICH's Lock_all waits until the other ranks have answered, and one that sleeps or has ended answers nobody.
    barrier()
    if comm.allreduce(Barrier.works(), MPI.LAND) and cores_are_oversubscribed(comm):
        barrier = Barrier(words, comm.rank, comm.size, window.Sync, comm.Iprobe)
    return SharedSpace(comm, window, memory, barrier)
