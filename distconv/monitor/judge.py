"""Whether the job must end because a rank does not live, or does not come on; and which rank it is.

Time counts only while the one who looks is awake, so a job that was stopped as a whole, and goes on, is not ended.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Hashable, Iterable, Sequence

from distconv.monitor.whereabouts import HEAD, PATIENT, PLACES, Entry, is_stopped
from distconv.process.launched import GRACE, listed

LOOK = 0.5  # seconds between two looks
LEAST = 60.0  # seconds that a rank may stand still, unless a user says otherwise
TIMES = 20  # the longest that one was seen to stand still
PATIENCE = 900.0  # seconds at a place where it may stay long, and where none was seen to move yet


class Stillness:
    """For how many seconds numbers have not changed, as far as somebody has looked."""

    def __init__(self) -> None:
        self.last: dict[Hashable, int] = {}
        self.seconds: dict[Hashable, float] = {}

    def look(self, name: Hashable, number: int, elapsed: float) -> float:
        """The seconds of that name, when elapsed more have passed."""
        same = self.last.get(name) == number
        self.last[name] = number
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed if same else 0.0
        return self.seconds[name]


class Judge:
    """What one rank has seen of the others. own: its rank; hosts: the name of each rank's host.

    limit: seconds that a rank may give no sign of life. moves_limit: that it may stay at a place of the training, 0 for
    TIMES as long as one was seen to; None: it may stay for ever.
    """

    def __init__(self, own: int, hosts: Sequence[str]) -> None:
        self.own, self.hosts = own, hosts
        self.limit = LEAST
        self.moves_limit: float | None = None
        self.longest = 0.0  # seconds between two moves of the training; 0: none was seen
        self.places: dict[int, str] = {}  # of each rank, at the last look
        self.still = Stillness()

    def judge(self, near: Sequence[Entry], far: Sequence[Sequence[Entry]], elapsed: float) -> str:
        """Why the job must end, in a sentence, or nothing.

        near: the entries of the ranks that share memory with this one, its own among them; far: those of each other
        host whose signs of life it gets, none for a host that was never heard of; elapsed: seconds since last time.
        """
        return (
            self._silent_ranks(near, elapsed)
            or self._silent_hosts(far, elapsed)
            or self._standing_ranks([*near, *(entry for entries in far for entry in entries)], elapsed)
        )

    def _silent_ranks(self, near: Sequence[Entry], elapsed: float) -> str:
        """Ranks of this host whose threads do not look any more."""
        quiet = {e.rank: self.still.look(("beats", e.rank), e.beats, elapsed) for e in near if e.rank != self.own}
        silent = [entry for entry in near if quiet.get(entry.rank, 0.0) > self.limit]
        earlier = sum(quiet[entry.rank] <= self.limit for entry in near if entry.rank < self.own)
        if not silent or max(quiet.values()) <= self.limit + earlier * GRACE:  # the first one alive speaks
            return ""
        stopped = [entry.rank for entry in silent if is_stopped(entry.process)]
        why = f": kill -STOP has stopped rank {listed(stopped)}" if stopped else ""
        return f"{self._named(silent)} gave no sign of life for {max(quiet.values()):.0f} s{why}"

    def _silent_hosts(self, far: Sequence[Sequence[Entry]], elapsed: float) -> str:
        for number, entries in enumerate(far):
            seconds = self.still.look(("host", number), entries[0].beats if entries else 0, elapsed)
            if seconds > self.limit + (GRACE / 2 if len(entries) > 1 else 0):  # they may find out what it is
                who = self._named(entries) if entries else "a host that was never heard of"
                return f"{who} gave no sign of life for {seconds:.0f} s: stopped, or the host or its network is down"
        return ""

    def _standing_ranks(self, everyone: Sequence[Entry], elapsed: float) -> str:
        """Ranks that live, but do not come on; only rank 0 sees them all."""
        if self.moves_limit is None or self.own != 0:
            return ""
        for entry in everyone:
            before, place = self.still.seconds.get(("moves", entry.rank), 0.0), self.places.get(entry.rank)
            if self.still.look(("moves", entry.rank), entry.moves, elapsed) == 0 and place not in (None, *PATIENT):
                self.longest = max(self.longest, before, LOOK)
            self.places[entry.rank] = PLACES[entry.place]
        last = behind(everyone)
        if PLACES[last[0].place] == "download":
            return ""  # it may be slow, and ends by itself where it stalls
        seconds = min(self.still.seconds["moves", entry.rank] for entry in last)
        limit = self.moves_limit or max(LEAST, TIMES * self.longest)
        slow = PLACES[last[0].place] in PATIENT or not (self.moves_limit or self.longest)
        if slow or (PLACES[last[0].place] == "save" and not self.moves_limit):  # a disk may be
            limit = max(limit, PATIENCE)
        # A rank without a sign of life is told of first, by those who see why.
        return f"{self._named(last)} did not come on for {seconds:.0f} s" if seconds > limit + 2 * LOOK else ""

    def _named(self, entries: Iterable[Entry]) -> str:
        """rank 1 of 4 on h0 (compute, step 12)"""
        P, told = len(self.hosts), sorted(entries, key=lambda entry: entry.rank)
        each = [f"rank {entry.rank} of {P} on {self.hosts[entry.rank]} ({entry.where()})" for entry in told]
        return ", ".join(each[:4]) + (f" and {len(each) - 4} more" if len(each) > 4 else "")


def behind(entries: Iterable[Entry]) -> list[Entry]:
    """Those for whom the others wait: at the earliest step, and there at the earliest place."""
    everyone = list(entries)
    first = min((entry.step, entry.place) for entry in everyone)
    return [entry for entry in everyone if (entry.step, entry.place) == first]


def read(message: bytes) -> tuple[int, list[Entry]]:
    """What a host tells, as Whereabouts lies in memory: the exit code of a job that ends, and its ranks' entries."""
    if not message:
        return 0, []
    entries = (Entry * ((len(message) - HEAD) // ctypes.sizeof(Entry))).from_buffer_copy(message, HEAD)
    return int.from_bytes(message[:HEAD], sys.byteorder), [entry for entry in entries if entry.process]  # then padding
