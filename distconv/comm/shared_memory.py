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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from distconv.comm.barrier import Barrier
from distconv.comm.world import load_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

SHARED_MEMORY = Path("/dev/shm")
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


def share(comm: MPI.Comm, nbytes: int) -> tuple[memoryview, Callable[[], None]] | None:
    """Memory that the ranks of one host share, nbytes for each of them, one behind the other; collective over comm.

    Returns it with a barrier, after which all ranks see what each has written before it; or None where the ranks are
    not on one host with room for it. It lasts as long as the process. nbytes is a multiple of 8.
    """
    MPI = load_mpi()
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

    def spinning() -> None:
        window.Sync()
        comm.Barrier()
        window.Sync()

    if last:
        words[:] = bytes(len(words))
    # MPICH's Lock_all waits until the other ranks have answered, and one that sleeps or has ended answers nobody.
    spinning()
    if comm.allreduce(Barrier.works(), MPI.LAND) and cores_are_short(comm):
        return memory, Barrier(words, comm.rank, comm.size, window.Sync, comm.Iprobe)
    return memory, spinning


def cores_are_short(comm: MPI.Comm) -> bool:
    """Whether these ranks, all of one host, are more than the cores on which they may run; collective."""
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return comm.size > len(set().union(*comm.allgather(own)))
