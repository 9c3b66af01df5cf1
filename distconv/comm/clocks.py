"""How far the clocks of hosts are apart. All ranks of one host share its clocks.

A question goes to another host and comes back. Its clock was read somewhere in between, at the middle if both ways take
as long, and so the error is at most half of the round trip; of some, the shortest counts (Cristian 1989).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from distconv.comm.world import World

ROUNDS, MOST_ROUNDS = 20, 200  # more than 20 where none was short, as on hosts with other work
SHORT = 100_000  # nanoseconds of a round trip: the clocks are known to 50 us
TAG = 0xC10C


@dataclass(frozen=True)
class Reading:
    """What rank 0 has found out about a host's clock, in nanoseconds.

    at: on the host's clock; offset: how far that clock is ahead of rank 0's; round_trip: twice the error, at most.
    """

    at: int
    offset: int
    round_trip: int


def read_clocks(world: World, clock: Callable[[], int] = time.perf_counter_ns) -> dict[int, Reading]:
    """Readings of a clock of all hosts by their first rank, on rank 0; nothing on the others; collective.

    clock: gives nanoseconds.
    """
    first = world.local.bcast(world.rank)
    firsts = world.comm.gather(first)
    found: dict[int, Reading] = {}
    if world.rank == 0:
        found = {host: _ask(world, host, clock) for host in sorted(set(firsts))}
    elif world.rank == first:
        _answer(world, clock)
    world.wait()  # asleep: a rank that waits must not hold the core of one that answers
    return found


def _ask(world: World, host: int, clock: Callable[[], int]) -> Reading:
    question, answer, best = np.zeros(1, np.int64), np.zeros(1, np.int64), None
    if host == 0:
        return Reading(clock(), 0, 0)
    for number in range(1, MOST_ROUNDS + 1):
        is_short = best is not None and best.round_trip <= SHORT
        question[0] = number == MOST_ROUNDS or (number >= ROUNDS and is_short)  # whether it is the last one
        sent = clock()
        world.comm.Send(question, host, TAG)
        world.comm.Recv(answer, host, TAG)
        came = clock()
        if best is None or came - sent < best.round_trip:
            best = Reading(int(answer[0]), int(answer[0]) - (sent + came) // 2, came - sent)
        if question[0]:
            break
    assert best is not None
    return best


def _answer(world: World, clock: Callable[[], int]) -> None:
    question, answer = np.zeros(1, np.int64), np.zeros(1, np.int64)
    while not question[0]:
        world.comm.Recv(question, 0, TAG)
        answer[0] = clock()
        world.comm.Send(answer, 0, TAG)
