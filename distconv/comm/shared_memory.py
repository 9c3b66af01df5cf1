"""Memory that the ranks of a host share, and the shared memory that would outlive its job.

MPICH keeps the name of its segment in /dev/shm until MPI_Finalize. So a job that is killed leaves about 1 MB a rank,
and one that is started again and again fills a small /dev/shm. What a process has mapped needs no name. MPICH removes
the names of its windows itself. Open MPI's daemon removes those of its ranks, unless it is killed too; and UCX, over
which either library may talk, removes them only from a process that ends well.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from distconv.comm.barrier import Barrier
from distconv.comm.wire import Bytes

if TYPE_CHECKING:
    from mpi4py import MPI

SHARED_MEMORY = Path("/dev/shm")
CACHE_LINE = 64  # bytes
OF_MPICH = "mpich_sh*"  # names of segments, and of windows until all ranks have them
LEFT_BY_THE_DEAD = (OF_MPICH, "sm_segment.*", "vader_segment.*", "ucx_shm_posix_*")  # of Open MPI 5 and 4, of UCX


def forget_names() -> None:
    """Remove the names of the segments of MPICH that this process, and all ranks of its host, have mapped."""
    with contextlib.suppress(OSError):  # no /proc
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = Path(line.rpartition(" ")[2])
            if path.match(f"{SHARED_MEMORY}/{OF_MPICH}"):
                path.unlink(missing_ok=True)  # another rank may have been here


def sweep(folder: Path = SHARED_MEMORY) -> None:
    """Remove the segments that this user's dead jobs have left, as they were killed before they could do so themselves.

    Linux leases a file only where no other process has it open or mapped, in another container or not, and the ranks of
    a living job have.
    """
    for path in [path for names in LEFT_BY_THE_DEAD for path in folder.glob(names)]:
        with contextlib.suppress(OSError), path.open("r+b", buffering=0) as file:
            if os.fstat(file.fileno()).st_uid == os.geteuid():
                fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # should somebody open it now; SIGIO would end us
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                path.unlink()


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
    """Memory that P ranks of one host see: segments (P, nbytes), one of them each rank's own.

    After barrier(), all ranks see what each of them has written before. waited: seconds that this rank slept in it.
    """

    def __init__(self, rank: int, window: MPI.Win, segments: Bytes, barrier: Barrier | SpinningBarrier) -> None:
        self.rank, self.window, self.segments = rank, window, segments
        self.barrier: Callable[[], None] = barrier
        self.counter = barrier

    @property
    def waited(self) -> float:
        return self.counter.waited

    def close(self) -> None:
        """Give the memory back; collective. Whoever has taken views of the segments must not use them any more."""
        if self.barrier is not closed:
            self.segments, self.barrier = np.zeros((0, 0), np.uint8), closed
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
    if comm.allreduce(Barrier.works(), MPI.LAND) and cores_are_short(comm):
        barrier = Barrier(words, comm.rank, comm.size, window.Sync, comm.Iprobe)
    return SharedSpace(comm.rank, window, np.frombuffer(memory, np.uint8).reshape(comm.size, nbytes), barrier)


def cores_are_short(comm: MPI.Comm) -> bool:
    """Whether these ranks, all of one host, are more than the cores on which they may run; collective."""
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return comm.size > len(set().union(*comm.allgather(own)))
