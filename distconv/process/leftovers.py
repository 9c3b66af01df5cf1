"""Shared memory that would outlive its job.

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
from pathlib import Path

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
