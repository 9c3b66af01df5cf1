"""Where each rank is: what it does, at which step, and whether it lives, in memory that the ranks of a host share.

The memory belongs to no file (memfd_create(2)), so that nothing of it stays behind, however a job ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import mmap
import os
import signal
import time
from pathlib import Path
from typing import Any

# What a rank may be doing, in the order in which a step comes to it: of two ranks at the same step, the one at the
# earlier place is behind.
PLACES = ("start", "download", "data", "compile", "compute", "exchange", "evaluate", "gather", "agree", "save", "end")
PATIENT = ("start", "download", "data", "compile", "end")  # where a rank may stay long
STACK_SIGNAL = signal.SIGRTMIN + 3 if hasattr(signal, "SIGRTMIN") else None  # asks a rank for its stack
SECONDS_FOR_A_STACK = 0.5
HEAD = 8  # bytes before the entries


class Entry(ctypes.Structure):
    """Of one rank. beats: how often its watching thread has looked; moves: how often its work has come to a new place.

    stack: the descriptor of the file into which it writes its stack when it is asked to, or -1; leaving: whether it is
    done, and may end.
    """

    _fields_ = (
        ("rank", ctypes.c_int32),
        ("process", ctypes.c_int32),
        ("stack", ctypes.c_int32),
        ("place", ctypes.c_uint32),
        ("beats", ctypes.c_uint32),
        ("moves", ctypes.c_uint32),
        ("leaving", ctypes.c_uint32),
        ("step", ctypes.c_int64),
    )

    def where(self) -> str:
        """For people: compute, step 12"""
        return PLACES[self.place] + (f", step {self.step + 1}" if PLACES[self.place] not in PATIENT else "")


class Whereabouts:
    """The entries of the ranks that this one shares memory with, or of itself alone where they cannot; collective.

    comm: the ranks of one host; afterwards, those that share. ending: 0, or the exit code with which the job ends.
    """

    def __init__(self, comm: Any, rank: int) -> None:
        nbytes = HEAD + comm.size * ctypes.sizeof(Entry)
        memory = _shared(comm, nbytes)
        self.comm = comm if memory is not None else comm.Split(comm.rank)
        self.memory = memory if memory is not None else bytearray(nbytes)
        self._ending = ctypes.c_int64.from_buffer(self.memory)
        self.entries = (Entry * self.comm.size).from_buffer(self.memory, HEAD)
        self.own = self.entries[self.comm.rank]
        self.own.rank, self.own.process, self.own.stack = rank, os.getpid(), _stack_file()
        self.comm.Barrier()

    @property
    def ending(self) -> int:
        return self._ending.value

    @ending.setter
    def ending(self, code: int) -> None:
        self._ending.value = code

    def at(self, place: str, step: int | None = None) -> None:
        """Note that this rank has come to a place, in the step after so many; None: the same step as before."""
        self.own.place = PLACES.index(place)
        self.own.step = self.own.step if step is None else step
        self.own.moves += 1

    def stacks(self) -> dict[int, str]:
        """The stacks of all threads of these ranks, by rank, as far as they can be had; sets a stopped rank going."""
        asked = [entry for entry in self.entries if entry.stack >= 0]
        for entry in asked:
            with contextlib.suppress(OSError):
                os.kill(entry.process, STACK_SIGNAL or 0)
                os.kill(entry.process, signal.SIGCONT)
        deadline, found = time.monotonic() + SECONDS_FOR_A_STACK, dict[int, str]()
        while len(found) < len(asked) and time.monotonic() < deadline:
            time.sleep(SECONDS_FOR_A_STACK / 10)
            for entry in asked:
                with contextlib.suppress(OSError):
                    text = Path(f"/proc/{entry.process}/fd/{entry.stack}").read_text(errors="replace")
                    if text.endswith("\n"):
                        found[entry.rank] = text
        return found


def is_stopped(process: int) -> bool:
    """Whether a process of this host has been stopped by a signal, as kill -STOP does."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _shared(comm: Any, nbytes: int) -> mmap.mmap | None:
    """Memory, zero at first, that the ranks of comm share; None on all of them where one cannot have it; collective."""
    token, path, memory = os.urandom(16), "", None
    with contextlib.suppress(OSError, AttributeError):
        if comm.rank == 0:
            ours = os.memfd_create("distconv-whereabouts")
            os.pwrite(ours, token, nbytes)
            path = f"/proc/{os.getpid()}/fd/{ours}"
    path, token = comm.bcast((path, token))
    with contextlib.suppress(OSError, ValueError):
        file = os.open(path, os.O_RDWR)
        if os.pread(file, len(token), nbytes) == token:  # else its processes are counted apart from ours
            memory = mmap.mmap(file, nbytes)
        os.close(file)
    return memory if all(comm.allgather(memory is not None)) else None


def _stack_file() -> int:
    """Have this process write its stacks into a file at STACK_SIGNAL, without Python's help; returns its descriptor."""
    if STACK_SIGNAL is None or not hasattr(os, "memfd_create"):
        return -1
    file = os.memfd_create("distconv-stack")
    faulthandler.register(STACK_SIGNAL, file, all_threads=True)
    return file
