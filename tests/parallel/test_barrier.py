"""The barrier of shared memory, MPI's and the one that sleeps: nobody leaves before all have come."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import numpy as np
import pytest

from distconv.comm import shared_memory
from distconv.comm.barrier import LINE, Barrier
from distconv.comm.exchange import HEADER, Flat
from distconv.comm.shared_memory import share
from distconv.comm.transport import segments
from distconv.comm.wire import WIRES
from distconv.comm.world import World
from distconv.process.time_slices import cores_are_oversubscribed

needs_futex = pytest.mark.skipif(not Barrier.works(), reason="no futex here")


@pytest.fixture(params=[True, False], ids=["asleep", "MPI's"])
def waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were too few cores, or enough."""
    if request.param and not Barrier.works():
        pytest.skip("no futex here")
    monkeypatch.setattr(shared_memory, "cores_are_oversubscribed", lambda comm: request.param)


@pytest.fixture
def one_core() -> Iterator[None]:
    """All ranks on the same core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_nobody_leaves_before_all_have_come(world: World, waiting: None) -> None:
    space = share(world.comm, 64)
    assert space is not None
    barrier, rounds = space.barrier, segments(space).view(np.int64)[:, 0]
    naps = np.random.default_rng(world.rank).random(200) < 0.1  # others in every rank
    for number, nap in enumerate(naps):
        if nap:
            time.sleep(0.001)
        rounds[world.rank] = number
        barrier()
        assert rounds.tolist() == [number] * world.size
        barrier()


@needs_futex
def test_the_count_may_pass_the_largest_number_of_its_word(world: World) -> None:
    space = share(world.comm, Barrier.nbytes(world.size))
    assert space is not None
    wait, words = space.barrier, space.memory[: Barrier.nbytes(world.size)]  # the first rank's part
    if world.rank == 0:
        np.frombuffer(words, np.uint32)[:] = 2**32 - 3
    wait()
    barrier = Barrier(words, world.rank, world.size, lambda: None, lambda: None)
    for _ in range(6):
        barrier()
    wait()
    assert np.frombuffer(words, np.uint32)[:: LINE // 4].tolist() == [3] * world.size


def test_the_sum_has_the_same_bits_however_the_ranks_wait(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for short in (True, False):
        monkeypatch.setattr(shared_memory, "cores_are_oversubscribed", lambda comm, short=short: short)
        exchange = Flat(world.comm, 5000, WIRES["float16"])
        header = np.zeros((), HEADER)
        vectors = np.random.default_rng(world.rank).standard_normal((50, 5000)).astype(np.float32)
        for vector in vectors:
            exchange.sum(vector, header)
        results.append(vectors.tobytes())
    assert results[0] == results[1]
    assert len(set(world.comm.allgather(results[0]))) == 1


@needs_futex
def test_a_rank_that_waits_leaves_its_core(world: World, one_core: None) -> None:
    if world.size == 1:
        pytest.skip("nobody to wait for")
    space = share(world.comm, Barrier.nbytes(world.size))
    assert space is not None
    wait, words = space.barrier, space.memory[: Barrier.nbytes(world.size)]  # the first rank's part
    calls: list[float] = []
    if world.rank == 0:
        words[:] = bytes(len(words))
    wait()
    barrier = Barrier(words, world.rank, world.size, lambda: None, lambda: calls.append(time.perf_counter()))
    began, worked = time.perf_counter(), time.process_time()
    if world.rank == world.size - 1:
        time.sleep(2.5)
    barrier()
    waited, worked = time.perf_counter() - began, time.process_time() - worked
    assert waited > 1.5
    if world.rank < world.size - 1:
        assert waited / 2 < barrier.waited <= waited  # so the step can tell it
    assert worked < waited / 5  # one that spins works all the time, or its share of it with the others
    assert 1 <= len(calls) <= 5 or world.rank == world.size - 1  # two, by the clock


@pytest.mark.parametrize(
    ("allowed", "enough"),
    [([{0}, {0}, {0}, {0}], 1), ([{0, 1}] * 4, 2), ([{0}, {1}, {2}, {3}], 4), ([{5, 6, 7}, {7}, {5}, {6}], 3)],
)
def test_cores_are_oversubscribed_where_ranks_outnumber_those_they_may_use(
    world: World, allowed: list[set[int]], enough: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed[world.rank])
    assert cores_are_oversubscribed(world.comm) == (world.size > enough)
