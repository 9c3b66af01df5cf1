"""glibc's malloc: freed memory stays in the process, and what MPI takes for its start is zero."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _PERTURB = -1, -3, -6  # of glibc's mallopt(3)
_TO_ZERO = 0xFF  # new memory gets the complement of M_PERTURB
LARGEST = 1 << 29  # bytes
OLD_LARGEST = 1 << 25  # what a glibc that refuses LARGEST takes


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, so that the arrays of a step lie where those of the last one lay.

    By default glibc gives large blocks back, and each step pays for their pages. Concerns the whole process. Does
    nothing where the C library has no mallopt.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, LARGEST) or libc.mallopt(_MMAP_THRESHOLD, OLD_LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, LARGEST)


@contextlib.contextmanager
def zeroed_memory() -> Iterator[None]:
    """Within the block, malloc gives memory that is filled with zeros, but for pieces of up to 1 KiB used before.

    MPICH 5 with UCX tells its launcher 4 KiB from where a rank's address begins, which is longer than the address. The
    less of what lies behind is zero, the longer the lines. Of one longer than 1,023 bytes `srun --mpi=pmi2` (Slurm
    22.05) makes two, and the job dies or waits for ever. Does nothing where the C library has no mallopt.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        yield
        return
    mallopt(_PERTURB, _TO_ZERO)
    try:
        yield
    finally:
        mallopt(_PERTURB, 0)
