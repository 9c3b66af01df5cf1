"""distconv.Allreduce: its sums are right, on every communicator, and its report tells what became of them."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from mpi4py import MPI

import distconv
from distconv.comm.wire import WIRES
from distconv.comm.world import World
from tests.parallel.allreduce import SIZE, arrays, assert_works, contribution

# Of a sum, relative to the magnitudes that are added: rounded on the way out, and on the way back.
ERROR = {"float16": 2 * 2**-11, "int8": 0.04, "float32": 1e-6, "float64": 1e-14}


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("size", [1, 257, 100_000])
def test_sums_and_means_are_those_of_numpy_within_the_error_of_the_wire(world: World, wire: str, size: int) -> None:
    parts = [contribution(rank, size, WIRES[wire].dtype) for rank in range(world.size)]
    exact = np.sum(parts, axis=0, dtype=np.float64)
    with distconv.Allreduce(world.comm, size, wire=wire) as allreduce:
        for method, wanted in ((allreduce.sum, exact), (allreduce.mean, exact / world.size)) * 2:
            vector = parts[world.rank].copy()
            assert method(vector) is vector
            assert np.linalg.norm(vector - wanted) <= ERROR[wire] * np.linalg.norm(np.abs(parts).sum(axis=0))
            assert len(set(world.comm.allgather(vector.tobytes()))) == 1


def test_a_wire_that_rounds_at_random_gives_each_call_its_own_bits_and_each_run_the_same(world: World) -> None:
    runs: list[list[bytes]] = []
    for _ in range(2):
        with distconv.Allreduce(world.comm, SIZE, "int8") as allreduce:
            runs.append([allreduce.sum(contribution(world.rank)).tobytes() for _ in range(3)])
    assert runs[0] == runs[1] and len(set(runs[0])) == 3


@pytest.mark.parametrize("method", ["sum", "mean"])
def test_a_list_of_arrays_gets_the_bits_of_the_vector_they_are_parts_of(world: World, method: str) -> None:
    with distconv.Allreduce(world.comm, SIZE) as allreduce:
        vector = getattr(allreduce, method)(contribution(world.rank))
        for kind in (list, tuple):
            given = kind(arrays(contribution(world.rank)))
            assert getattr(allreduce, method)(given) is given
            for array, wanted in zip(given, arrays(vector), strict=True):
                np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("wire", ["float16", "float32"])
@pytest.mark.parametrize("exchange", ["auto", "flat", "two-level"])
def test_the_report_tells_what_was_sent_lost_and_not_finite(world: World, wire: str, exchange: str) -> None:
    with distconv.Allreduce(world.comm, SIZE, wire, exchange) as allreduce:
        assert allreduce.last is None
        allreduce.sum(contribution(world.rank))
        report = allreduce.last
        assert report is not None and report.not_finite == ()
        assert (report.bytes_sent > 0) == (world.size > 1 and exchange != "two-level")  # that is one host here
        assert 0 <= report.waited <= report.seconds and report.exchanged == report.seconds - report.waited
        assert 1e-4 < report.rounding < 3e-4 if wire == "float16" else report.rounding == 0
        given = arrays(contribution(world.rank))
        if world.rank == world.size - 1:
            given[2][6, 1, 2] = np.nan
            given[4][3] = np.inf
        allreduce.sum(given)
        assert allreduce.last is not None
        found = [(bad.rank, bad.array, bad.index) for bad in allreduce.last.not_finite]
        assert found == [(world.size - 1, 2, (6, 1, 2))]
        assert np.isnan(given[2][6, 1, 2]) and given[4][3] == np.inf and np.isfinite(given[0]).all()
        assert 0 <= allreduce.last.rounding < 3e-4


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("exchange", ["flat", "two-level"])
def test_numbers_that_are_not_finite_raise_nothing_even_where_numpy_is_told_to(
    world: World, wire: str, exchange: str
) -> None:
    with np.errstate(all="raise"), distconv.Allreduce(world.comm, SIZE, wire, exchange) as allreduce:
        vector = np.full(SIZE, np.finfo(WIRES[wire].dtype).tiny, WIRES[wire].dtype)
        vector[:3] = np.inf if world.rank % 2 else -np.inf, np.nan, np.finfo(vector.dtype).max / 1.5
        allreduce.mean(vector)
        assert allreduce.last is not None and len(allreduce.last.not_finite) == world.size
        assert allreduce.last.rounding < ERROR[wire]
    assert np.isnan(vector[:2]).tolist() == [world.size > 1, True]
    assert np.isinf(vector[2]) == (world.size > 1)
    assert np.isfinite(vector[3:]).all()


def test_waiting_for_a_slow_rank_is_told_from_exchanging(world: World) -> None:
    with distconv.Allreduce(world.comm, SIZE) as allreduce:
        allreduce.sum(contribution(world.rank))
        slow = threading.Event()
        if world.rank == 0:
            slow.wait(0.3)  # work
        allreduce.sum(contribution(world.rank))
        assert allreduce.last is not None
        assert (allreduce.last.waited > 0.2) == (world.rank != 0)


def test_any_communicator_will_do_and_several_at_once(world: World) -> None:
    half = world.comm.Split(world.rank % 2, -world.rank)
    with (
        distconv.Allreduce(half, 300) as of_half,
        distconv.Allreduce(MPI.COMM_SELF, 20, "float32") as alone,
        distconv.Allreduce(world.comm.Create_cart([world.size]), 7, "float64") as of_all,
        distconv.Allreduce(world.comm, 7) as another,
    ):
        for _ in range(2):
            ranks = range(world.rank % 2, world.size, 2)
            np.testing.assert_array_equal(of_half.sum(np.full(300, world.rank, np.float32)), sum(ranks))
            np.testing.assert_array_equal(alone.sum(np.full(20, world.rank, np.float32)), world.rank)
            np.testing.assert_array_equal(of_all.sum(np.full(7, float(world.rank))), sum(range(world.size)))
            assert_works(another, world)


def test_the_scripts_own_messages_stay_its_own(world: World) -> None:
    with distconv.Allreduce(world.comm, SIZE) as allreduce:
        following = (world.rank + 1) % world.size
        request = world.comm.isend("mine", dest=following, tag=MPI.COMM_WORLD.Get_attr(MPI.TAG_UB))
        assert_works(allreduce, world)
        assert world.comm.recv() == "mine"
        request.wait()
