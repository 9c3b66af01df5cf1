"""Freed memory stays in the process, so that the arrays of a training step lie where those of the last one lay."""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
LARGEST = 1 << 29  # bytes
OLD_LARGEST = 1 << 25  # what a glibc that refuses LARGEST takes


def keep_freed_memory() -> None:
    """Have malloc keep what is freed. By default glibc gives large blocks back, and each step pays for their pages.

    Concerns the whole process. Does nothing where the C library has no mallopt.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, LARGEST) or libc.mallopt(_MMAP_THRESHOLD, OLD_LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, LARGEST)
