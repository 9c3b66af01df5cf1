"""Long time slices for ranks that share a core.

Linux gives two processes on one core time slices of some 3 ms, and after each the cache holds the other's numbers.
Ranks that compute their gradients in one go, one after the other, are done sooner. Linux 6.12 and newer let a process
ask for slices of a length (sched_setattr(2)); older ones take no notice. The share of the core stays the same.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

TIME_SLICE = 50_000_000  # nanoseconds: a gradient, mostly; 100 ms measured alike, 20 ms gained less
GET, SET = {"x86_64": (315, 314), "aarch64": (275, 274)}.get(platform.machine(), (None, None))
ORDINARY = (0, 3)  # SCHED_OTHER and SCHED_BATCH; the others are a cluster's own choice


class Attributes(ctypes.Structure):
    """C's struct sched_attr, in its first form."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def take_long_time_slices() -> bool:
    """Ask for slices of TIME_SLICE for this thread and those that it starts; returns whether it has them now."""
    if sys.platform != "linux" or GET is None:
        return False
    libc, attributes = ctypes.CDLL(None), Attributes()
    get = GET, 0, ctypes.byref(attributes), ctypes.sizeof(attributes), 0
    if libc.syscall(*get) != 0 or attributes.policy not in ORDINARY:
        return False
    attributes.runtime = TIME_SLICE
    libc.syscall(SET, 0, ctypes.byref(attributes), 0)
    return bool(libc.syscall(*get) == 0 and attributes.runtime == TIME_SLICE)


def cores_are_oversubscribed(comm: MPI.Comm) -> bool:
    """Whether these ranks, all of one host, are more than the cores on which they may run; collective."""
    return comm.size > len(set().union(*comm.allgather(own_cores())))


def own_cores() -> set[int]:
    """The numbers of the cores on which this process may run."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
