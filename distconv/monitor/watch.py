"""See that every rank lives and comes on, and end the job where one does not.

A rank may end without a word, and the launcher may miss it: MPICH's misses some of those that leave with an exit code
(5.0.2: one in thirty where we looked). It may be stopped, or wait for ever for a disk, a lock, or a collective that the
others do not call. A host may lose its network or its power. The other ranks would wait for ever.

So each rank has a thread that looks every half a second: within a host at memory that the ranks share, between hosts at
messages.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
import traceback
from collections.abc import Callable, Mapping

from distconv.errors import HUNG
from distconv.monitor.heartbeat import Heartbeat
from distconv.monitor.judge import LEAST, LOOK, Judge, read
from distconv.monitor.whereabouts import Whereabouts
from distconv.process.launched import GRACE


class Watch:
    """The thread of one rank. processes: ids of the other ranks of this host, by rank.

    These are called from it: lost, with the ranks that have ended, GRACE after the first, and with the others; hung,
    with a sentence where a rank does not live or come on, or with an empty one where another host says it; end, after
    either, with the job's exit code.
    """

    def __init__(
        self,
        table: Whereabouts,
        heartbeat: Heartbeat | None,
        judge: Judge,
        processes: Mapping[int, int],
        lost: Callable[[list[int], list[int]], object],
        hung: Callable[[str], object],
        end: Callable[[int], object],
    ) -> None:
        self.table, self.heartbeat, self.judge, self.processes = table, heartbeat, judge, processes
        self.lost, self.hung, self.end = lost, hung, end
        self.far = dict.fromkeys(heartbeat.others if heartbeat else (), b"")  # what each other host has last told
        self.gone: list[int] = []  # ranks that have ended
        self.over = threading.Event()
        self.woken, self.wake = os.pipe()
        self.descriptors = self._open(processes)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def set_limits(self, seconds: float) -> None:
        """From now on end the job where a rank stands still for so long; 0: for much longer than one was seen to."""
        self.judge.limit, self.judge.moves_limit = seconds or LEAST, seconds

    def stop(self) -> None:
        """From now on processes may end."""
        self.over.set()
        os.write(self.wake, b"\0")
        self.thread.join()

    def _open(self, processes: Mapping[int, int]) -> dict[int, int]:
        """Descriptors that become readable when a process has ended, with its rank.

        Where Linux lacks pidfd_open(2), as before 5.3, or refuses it, as in some containers, there are none.
        """
        found: dict[int, int] = {}
        for rank, process in processes.items():
            try:
                found[os.pidfd_open(process)] = rank
            except ProcessLookupError:
                self.gone.append(rank)
            except (AttributeError, OSError):
                return {}
        return found

    def _run(self) -> None:
        try:
            self._look_out()
        except Exception:  # without this thread, the job might hang one day
            traceback.print_exc()
            self.end(1)

    def _look_out(self) -> None:
        poll, last, gone_for = select.poll(), time.monotonic(), 0.0
        for descriptor in (self.woken, *self.descriptors):
            poll.register(descriptor, select.POLLIN)
        while not self.over.is_set():
            for descriptor, _ in poll.poll(1000 * LOOK):
                poll.unregister(descriptor)
                self.gone += [self.descriptors[descriptor]] if descriptor in self.descriptors else []
            done = {entry.rank for entry in self.table.entries if entry.leaving}
            self.gone = [rank for rank in self.gone if rank not in done]
            elapsed, last = min(time.monotonic() - last, 2 * LOOK), time.monotonic()
            self.table.own.beats += 1
            gone_for += elapsed if self.gone else 0.0
            if self.over.is_set():
                return
            if gone_for > GRACE:
                self.lost(self.gone, [rank for rank in self.processes if rank not in self.gone])
                self.end(1)
            elif self._told_to_end() or self.table.ending:
                self._await_the_end()
            elif sentence := self.judge.judge(
                self.table.entries, [read(message)[1] for message in self.far.values()], elapsed
            ):
                self._decide(sentence)

    def _told_to_end(self) -> bool:
        """Exchange signs of life with the other hosts; whether one of them has decided that the job ends."""
        if self.heartbeat is None:
            return False
        with contextlib.suppress(Exception):  # of MPI: who cannot be reached gives no sign of life, and counts as such
            self.far.update(self.heartbeat.exchange(bytes(self.table.memory)))
        if self.table.ending or not any(read(message)[0] for message in self.far.values()):
            return False
        self.table.ending = HUNG
        self.hung("")
        return True

    def _decide(self, sentence: str) -> None:
        """End the job, when all hosts have had the time to take down their stacks."""
        self.table.ending = HUNG
        self.hung(sentence)
        if len(self.table.entries) < len(self.judge.hosts):
            self._keep_telling(GRACE / 2)
        self.end(HUNG)

    def _await_the_end(self) -> None:
        """Another rank ends the job; should it fail to, do it."""
        self._keep_telling(2 * GRACE)
        self.end(HUNG)

    def _keep_telling(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._told_to_end()
            time.sleep(LOOK / 5)
