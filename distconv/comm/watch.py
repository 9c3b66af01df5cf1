"""See that another rank of this host has died, even where the launcher does not.

A launcher ends the job when one of its processes does. MPICH's misses some that leave with an exit code, without a
signal and without MPI_Finalize: those whose code it takes note of before it sees their connection closed (5.0.2: one in
thirty where we looked). The other ranks would wait for ever.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Mapping

GRACE = 2  # seconds that the launcher has to end the job, as it mostly does within 0.2


class Watch:
    """Sleeps in a thread of its own until one of the processes has ended; then, GRACE later, calls lost.

    processes: process ids by rank. lost is called with the ranks that have ended and with those that have not. Where
    Linux lacks pidfd_open(2), as before 5.3, or refuses it, as in some containers, nobody is watched and only the
    launcher sees.
    """

    def __init__(self, processes: Mapping[int, int], lost: Callable[[list[int], list[int]], object]) -> None:
        self.lost = lost
        self.over = False
        self.ranks: dict[int, int] = {}  # by descriptor, which becomes readable when the process has ended
        self.poll = select.poll()
        with contextlib.suppress(AttributeError, OSError):
            for rank, process in processes.items():
                descriptor = os.pidfd_open(process)
                self.ranks[descriptor] = rank
                self.poll.register(descriptor, select.POLLIN)
        if self.ranks:
            threading.Thread(target=self._wait, daemon=True).start()

    def stop(self) -> None:
        """From now on processes may end."""
        self.over = True

    def _wait(self) -> None:
        self.poll.poll()
        time.sleep(GRACE)
        if not self.over:
            ended = [self.ranks[descriptor] for descriptor, _ in self.poll.poll(0)]
            self.lost(ended, [rank for rank in self.ranks.values() if rank not in ended])
