"""Stop on request: what SIGTERM, SIGUSR1 and Ctrl-C mean to a run.

A batch system that ends a job sends the same signal twice within milliseconds, and its launcher may pass each on.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import Any

from distconv.comm.world import end_job
from distconv.errors import STOPPED
from distconv.process.launched import GRACE
from distconv.process.voice import speak

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_REQUEST = 10.0  # seconds within which the same signal again is the same request; but for Ctrl-C, which is a person


class StopRequest:
    """Turns a signal into a request to stop after this step; a second request acts as the signal usually does.

    Before the first step there is nothing to save, so until `can_save` is set, the first signal ends the job, whatever
    this rank is doing: downloading, compiling, or waiting for another rank within MPI.
    """

    def __init__(self) -> None:
        self.can_save = False
        self.received: dict[int, float] = {}  # when each signal first came
        self.interrupts = 0
        wakeups, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        # Python runs a handler only between two of its own instructions, and a compiler's call may take seconds.
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._end_early, args=(wakeups,), daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, self._note)
        os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=self._forget)

    def requested(self) -> bool:
        return bool(self.received)

    def over(self) -> None:
        """Ignore what still comes, from a launcher that repeats itself.

        While Python ends, it gives signals their usual meaning back, but for those that are ignored.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _forget(self) -> None:
        """In a child that a user's code has forked, signals mean what they usually do; it would wake this rank, too."""
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        _release_signals()

    def _note(self, number: int, frame: Any) -> None:
        again = number in self.received and time.monotonic() - self.received[number] > ONE_REQUEST
        self.received.setdefault(number, time.monotonic())
        self.interrupts += number == signal.SIGINT
        if (self.interrupts > 1) if number == signal.SIGINT else again:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _end_early(self, wakeups: socket.socket) -> None:
        while number := wakeups.recv(1):
            if number[0] in SIGNALS:
                time.sleep(GRACE / 4)  # where another rank has failed, the launcher sends a signal, too, and then kills
                if not self.can_save:
                    speak("stopped on request before the first step; the same command starts again")
                    end_job(STOPPED)


def _hold_signals() -> None:
    """While a child is made; until it has forgotten what they mean to a run, one to it would be one to this rank."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _release_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
