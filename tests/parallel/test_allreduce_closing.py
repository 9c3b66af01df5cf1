"""distconv.Allreduce, closed or left: no rank waits for one that is gone, and nothing of it stays."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from mpi4py import MPI

import distconv
from distconv.comm import choose, shared_memory
from distconv.comm import exchange as exchanges
from distconv.comm.barrier import Barrier
from distconv.comm.world import World
from tests.parallel.allreduce import SIZE, arrays, assert_works, contribution


def test_one_that_is_closed_says_so_and_is_closed_but_once(world: World) -> None:
    with distconv.Allreduce(world.comm, SIZE) as allreduce:
        assert_works(allreduce, world)
        allreduce.close()
        with pytest.raises(RuntimeError, match="closed: make another"):
            allreduce.sum(contribution(0))
    allreduce.close()
    assert allreduce.last is not None and allreduce.last.rounding == 0  # of whole numbers


@pytest.mark.parametrize("others_do", ["sum", "list", "close"])
@pytest.mark.parametrize("leaving", ["close", "raise"])
def test_a_rank_that_leaves_is_missed_by_no_other(world: World, leaving: str, others_do: str) -> None:
    leaver = world.rank == world.size - 1
    allreduce = distconv.Allreduce(world.comm, SIZE)
    vector = contribution(world.rank)
    if leaver and leaving == "raise":
        with pytest.raises(ZeroDivisionError), allreduce:
            raise ZeroDivisionError("a bug of this rank's")
    elif leaver or others_do == "close":
        allreduce.close()
    else:
        with pytest.raises(
            RuntimeError, match="has closed it" if leaving == "close" else "by ZeroDivisionError: a bug"
        ):
            allreduce.sum(vector if others_do == "sum" else arrays(vector))
        np.testing.assert_array_equal(vector, contribution(world.rank))
    with pytest.raises(RuntimeError, match="closed"):
        allreduce.sum(vector)


def test_an_error_that_all_ranks_get_leaves_the_block_on_all(world: World) -> None:
    with pytest.raises(TypeError, match="float64"), distconv.Allreduce(world.comm, SIZE) as allreduce:
        allreduce.sum(np.zeros(SIZE, np.float64 if world.rank == 0 else np.float32))
    with pytest.raises(RuntimeError, match="closed"):
        allreduce.sum(np.zeros(SIZE, np.float32))


def test_an_error_that_all_ranks_of_a_part_get_is_told_to_the_others_and_to_no_others(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = world.rank == world.size - 1
    part = world.comm.Split(wrong)
    with pytest.raises((ValueError, RuntimeError)) as caught, distconv.Allreduce(world.comm, SIZE) as whole:
        with distconv.Allreduce(part, SIZE) as of_part:
            of_part.sum(contribution(0, SIZE + wrong))
        whole.sum(contribution(0))
    assert wrong or "has left its `with` block by ValueError: the vector has shape (1001,)" in str(caught.value)
    assert len(caplog.records) == (wrong and world.size > 1)
    caplog.clear()
    with (
        pytest.raises(ValueError, match="1001"),
        distconv.Allreduce(part, SIZE),
        distconv.Allreduce(world.comm, SIZE) as whole,
    ):
        whole.sum(contribution(0, SIZE + wrong))
    assert not caplog.records
    part.Free()


# In a child that was forked, which shares its parent's communicator; after MPI.Finalize, when a call ends the process.
@pytest.mark.parametrize(("module", "name", "told"), [(os, "getpid", -1), (MPI, "Is_finalized", True)])
def test_who_is_no_rank_any_more_does_not_speak_as_one(
    world: World, module: Any, name: str, told: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with distconv.Allreduce(world.comm, SIZE) as allreduce:
        with monkeypatch.context() as patch, pytest.raises(KeyError):
            patch.setattr(module, name, lambda: told)
            with allreduce:
                raise KeyError("a worker's own")
        assert not caplog.records
        monkeypatch.setattr(allreduce, "_ended", "")  # as a child's copy of it is not its parent's
        assert_works(allreduce, world)


def test_one_that_was_interrupted_does_not_go_on_out_of_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with distconv.Allreduce(world.comm, SIZE) as allreduce:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(allreduce._exchange, "sum", interrupted)
            allreduce.sum(contribution(0))
        with pytest.raises(RuntimeError, match="interrupted"):
            allreduce.sum(contribution(0))


class Interrupted(list[Any]):
    """Where Ctrl-C comes while a list is looked over, before anything has travelled."""

    def __iter__(self) -> Any:
        raise KeyboardInterrupt


def test_one_that_was_interrupted_before_it_spoke_does_not_go_on_either(world: World) -> None:
    with distconv.Allreduce(world.comm, SIZE) as allreduce:
        with pytest.raises(KeyboardInterrupt):
            allreduce.sum(Interrupted([contribution(0)]))
        with pytest.raises(RuntimeError, match="interrupted"):  # it would meet the others' call of before
            allreduce.sum(contribution(0))


@pytest.mark.parametrize(
    ("kind", "wire"), [*((kind, "float32") for kind in ("flat", "two-level", "buckets", "mpi")), ("flat", "int16")]
)
def test_every_exchange_is_closed_for_good_and_can_be_closed_again(world: World, kind: str, wire: str) -> None:
    exchange = choose.select(world.comm, SIZE, wire, kind)
    header = np.zeros((), exchanges.HEADER)
    exchange.sum(contribution(world.rank), header)
    waited = exchange.waited
    exchange.close()
    exchange.close()
    assert exchange.waited == waited
    with pytest.raises(RuntimeError):
        exchange.sum(contribution(world.rank), header)


@pytest.mark.parametrize(("exchange", "asleep"), [("flat", True), ("two-level", False)])
def test_what_was_allocated_is_given_back(
    world: World, exchange: str, asleep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asleep and not Barrier.works():
        pytest.skip("no futex here")
    monkeypatch.setattr(shared_memory, "cores_are_oversubscribed", lambda comm: asleep)

    def once() -> list[list[str]]:
        with distconv.Allreduce(world.comm, 500_000, exchange=exchange) as allreduce:
            allreduce.sum(np.ones(500_000, np.float32))
            return shared_mappings()

    once()
    before = shared_mappings()
    for _ in range(100 if world.size < 3 else 10):  # 200 in both forms
        within = once()
    after = shared_mappings()
    if world.size > 1:
        assert mapped_bytes(within) > mapped_bytes(before) + 1_000_000 * (world.size + 1)
    assert mapped_bytes(after) == mapped_bytes(before)
    files = {entry[5] for entry in within} - {entry[5] for entry in before}
    assert not [file for file in files if Path(file).exists()]  # what nobody maps is free, but for its name


def shared_mappings() -> list[list[str]]:
    """The memory of this process that others may see: places, rights, ..., file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [entry for line in lines if (entry := line.split(maxsplit=5))[1].endswith("s")]


def mapped_bytes(mappings: list[list[str]]) -> int:
    return sum(int(end, 16) - int(start, 16) for start, end in (entry[0].split("-") for entry in mappings))


def test_no_setting_of_the_process_is_touched(world: World) -> None:
    def settings() -> tuple[Any, ...]:
        return (
            [(signal.getsignal(each) if each not in (9, 19) else None) for each in signal.valid_signals()],
            os.sched_getscheduler(0),
            os.sched_getaffinity(0),
            threading.active_count(),
            [pool["num_threads"] for pool in threadpoolctl.threadpool_info()],
            dict(os.environ),
        )

    before = settings()
    with distconv.Allreduce(world.comm, SIZE) as allreduce:
        assert_works(allreduce, world)
        assert settings() == before
