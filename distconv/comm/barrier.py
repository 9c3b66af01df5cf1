"""A barrier for processes that share memory, in which those that wait sleep.

MPI's own barrier looks again and again whether the others have come. That is quickest as long as every rank has a core;
with more ranks than cores it takes the core away from the rank for which it waits. Here a rank that has nothing to do
leaves its core, and Linux wakes it when the number that it waits for changes (futex(2)).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
import time
from collections.abc import Callable

LINE = 64  # bytes from one rank's word to the next: a cache line, so that no rank's store disturbs another's
SYSTEM_CALL = {"x86_64": 202, "aarch64": 98}.get(platform.machine())
WAIT, WAKE = 0, 1
EVERYONE = 2**31 - 1
LOOK_AGAIN = 1  # seconds


class TimeSpan(ctypes.Structure):
    """C's struct timespec of 64-bit Linux."""

    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


class Barrier:
    """Calling it returns when all ranks have called it as often.

    memory: nbytes(size), the same for all ranks, zero before any of them makes its barrier. fence: makes what this
    process has written visible to the others before what it writes next, and the reverse for reading. idle: called
    again and again, LOOK_AGAIN seconds apart, by those that wait, who may owe others something meanwhile.

    Every rank counts its arrivals in a word of its own, so nothing must be changed atomically. Nobody can be two
    arrivals ahead of a rank that has not come, so another's word is this rank's last number, if the other has yet to
    come, or one or two more.

    waited: seconds that this process has slept in it.
    """

    def __init__(
        self, memory: memoryview, rank: int, size: int, fence: Callable[[], object], idle: Callable[[], object]
    ) -> None:
        words = [ctypes.c_uint32.from_buffer(memory, LINE * other) for other in range(size)]
        self.own = words[rank]
        self.others = words[rank + 1 :] + words[:rank]  # so that not all of them sleep on the same word
        self.fence, self.idle = fence, idle
        self.waited = 0.0

    @staticmethod
    def nbytes(size: int) -> int:
        return LINE * size

    @staticmethod
    def works() -> bool:
        """Whether this is a Linux that knows futexes and lets this process use them."""
        if sys.platform != "linux" or SYSTEM_CALL is None or ctypes.sizeof(ctypes.c_void_p) != 8:
            return False
        return _futex(ctypes.c_uint32(0), WAKE, 0) == 0

    def __call__(self) -> None:
        before = self.own.value
        self.fence()
        self.own.value = before + 1  # as C does it: from 2^32 - 1 to 0
        self.fence()
        _futex(self.own, WAKE, EVERYONE)
        for other in self.others:
            while other.value == before:
                began = time.perf_counter()
                woken = _sleep_while(other, before)
                self.waited += time.perf_counter() - began
                if not woken:
                    self.idle()
        self.fence()


def _sleep_while(word: ctypes.c_uint32, number: int) -> bool:
    """Sleep until another process wakes those that wait for this word; not at all if it is another number by now.

    False where LOOK_AGAIN has passed. Ends after a signal, too, so that Python's handlers run.
    """
    if _futex(word, WAIT, number) == 0:
        return True
    code = ctypes.get_errno()
    if code not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
        raise OSError(code, f"futex: {os.strerror(code)}")
    return code != errno.ETIMEDOUT


def _futex(word: ctypes.c_uint32, operation: int, number: int) -> int:
    result: int = _libc.syscall(
        SYSTEM_CALL, ctypes.byref(word), operation, ctypes.c_uint32(number), ctypes.byref(_TIMEOUT), None, 0
    )
    return result


_TIMEOUT = TimeSpan(LOOK_AGAIN, 0)  # of WAIT; WAKE does not look at it
_libc = ctypes.CDLL(None, use_errno=True)
