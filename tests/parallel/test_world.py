"""Agreeing and failing together."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator

import pytest

from distconv.comm.world import World
from distconv.errors import BadDataError, MismatchError
from distconv.process.time_slices import GET, TIME_SLICE, Attributes, cores_are_oversubscribed, take_long_time_slices


def test_an_error_of_one_rank_is_raised_on_all_and_names_it(world: World) -> None:
    last = world.size - 1
    with pytest.raises(BadDataError) as caught, world.together():
        if world.rank == last:
            raise BadDataError("the file is torn")
    assert str(caught.value) == ("the file is torn" if last == 0 else f"rank {last}: the file is torn")
    assert caught.value.everywhere


def test_what_rank_0_alone_finds_or_raises_all_ranks_have(world: World) -> None:
    assert world.on_rank_0(lambda: world.rank) == 0

    def fail() -> None:
        assert world.rank == 0
        raise BadDataError("the file is torn")

    with pytest.raises(BadDataError) as caught:
        world.on_rank_0(fail)
    assert str(caught.value) == "the file is torn"
    assert caught.value.everywhere


def test_ranks_that_disagree_are_named_on_all(world: World) -> None:
    world.agree("the seed", "7", "start all ranks alike")
    if world.size > 1:
        with pytest.raises(MismatchError, match=f"the seed: rank {world.size - 1} differs from rank 0"):
            world.agree("the seed", str(world.rank == world.size - 1), "start all ranks alike")


def test_ranks_that_wait_for_one_that_works_leave_it_the_cores(world: World) -> None:
    """That they sleep shows in the time for which they had a core; the last one works for a second."""
    for meet in (lambda: world.together(), lambda: agreeing(world)):
        world.comm.Barrier()
        began = time.process_time()
        with meet():
            while world.rank == world.size - 1 and time.process_time() - began < 1:
                pass
        assert world.rank == world.size - 1 or time.process_time() - began < 0.5


@contextlib.contextmanager
def agreeing(world: World) -> Iterator[None]:
    yield
    world.agree("the seed", "7", "start all ranks alike")


def test_one_host_is_one_host(world: World) -> None:
    assert (world.hosts, world.local_size, world.local_rank) == (1, world.size, world.rank)


def time_slice() -> int:
    """Nanoseconds that this thread asks for."""
    found = Attributes()
    ctypes.CDLL(None).syscall(GET, 0, ctypes.byref(found), ctypes.sizeof(found), 0)
    return int(found.runtime)


def test_ranks_that_share_a_core_take_long_time_slices_and_others_do_not(world: World) -> None:
    given: list[bool] = []
    thread = threading.Thread(target=lambda: given.append(take_long_time_slices()))
    thread.start()
    thread.join()
    if not given[0]:
        pytest.skip("this system gives nobody long time slices")
    assert (time_slice() == TIME_SLICE) == cores_are_oversubscribed(world.local)
