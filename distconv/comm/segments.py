"""Shared memory that would outlive its job.

MPICH keeps the name of its segment in /dev/shm until MPI_Finalize. So a job that is killed leaves about 1 MB a rank,
and one that is started again and again fills a small /dev/shm. What a process has mapped needs no name. MPICH removes
the names of its windows itself, and Open MPI's daemon removes those of its ranks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
NAMES = "mpich_sh*"  # of segments, and of windows until all ranks have them


def forget_names() -> None:
    """Remove the names of the segments that this process has mapped. All ranks of its host must have done so before."""
    with contextlib.suppress(OSError):  # no /proc
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = Path(line.rpartition(" ")[2])
            if path.match(f"{SHARED_MEMORY}/{NAMES}"):
                path.unlink(missing_ok=True)  # another rank may have been here


def sweep(folder: Path = SHARED_MEMORY) -> None:
    """Remove the segments of this user's jobs that were killed while MPI started, before their ranks could forget them.

    Linux leases a file only where no other process has it open or mapped, in another container or not, and the ranks of
    a living job have.
    """
    for path in folder.glob(NAMES):
        with contextlib.suppress(OSError), path.open("r+b", buffering=0) as file:
            if os.fstat(file.fileno()).st_uid == os.geteuid():
                fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # should somebody open it now; SIGIO would end us
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                path.unlink()
