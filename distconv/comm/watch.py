"""See that another rank of this host has died, even where the launcher does not.

A launcher ends the job when one of its processes does. MPICH's misses some that leave with an exit code, without a
signal and without MPI_Finalize: those whose code it takes note of before it sees their connection closed (5.0.2: one in
thirty where we looked). The other ranks would wait for ever. A rank that is alone on its host is watched by nobody.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Mapping

GRACE = 2  # seconds that the launcher has to end the job, as it mostly does within 0.2


class Watch:
    """Sleeps in a thread of its own until one of the processes has ended; then, GRACE later, calls lost.

    processes: process ids by rank. lost is called with the ranks that had ended when it woke, and with the others.
    Where Linux lacks pidfd_open(2), as before 5.3, or refuses it, as in some containers, nobody is watched.
    """

    def __init__(self, processes: Mapping[int, int], lost: Callable[[list[int], list[int]], object]) -> None:
        self.lost = lost
        self.over = False
        self.ranks: dict[int, int] = {}  # by descriptor, which becomes readable when the process has ended
        self.gone: list[int] = []  # before they could be watched
        try:
            for rank, process in processes.items():
                try:
                    self.ranks[os.pidfd_open(process)] = rank
                except ProcessLookupError:
                    self.gone.append(rank)
        except (AttributeError, OSError):
            return
        if processes:
            threading.Thread(target=self._wait, daemon=True).start()

    def stop(self) -> None:
        """From now on processes may end."""
        self.over = True

    def _wait(self) -> None:
        poll = select.poll()
        for descriptor in self.ranks:
            poll.register(descriptor, select.POLLIN)
        ended = self.gone or [self.ranks[descriptor] for descriptor, _ in poll.poll()]
        time.sleep(GRACE)
        if not self.over:
            self.lost(ended, [rank for rank in self.ranks.values() if rank not in ended])
