"""distconv.Allreduce: right sums, and one exception on every rank for whatever a script does wrong, without a hang."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from mpi4py import MPI

import distconv
from distconv.comm import choose, shared_memory, transport
from distconv.comm import exchange as exchanges
from distconv.comm.barrier import Barrier
from distconv.comm.wire import WIRES
from distconv.comm.world import World

SIZE = 1000
SHAPES = ((3, 100), (), (7, 9, 11), (0,), (6,))  # SIZE numbers together
# Of a sum, relative to the magnitudes that are added: rounded on the way out, and on the way back.
ERROR = {"float16": 2 * 2**-11, "float32": 1e-6, "float64": 1e-14}


def contribution(rank: int, size: int = SIZE, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng([size, rank]).standard_normal(size).astype(dtype)


def arrays(vector: np.ndarray) -> list[np.ndarray]:
    """Copies of a vector's parts, every second one in Fortran's order."""
    cuts = np.cumsum([int(np.prod(shape)) for shape in SHAPES])[:-1]
    parts = [part.reshape(shape) for part, shape in zip(np.split(vector, cuts), SHAPES, strict=True)]
    return [np.array(part, order="CF"[number % 2]) for number, part in enumerate(parts)]


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


def read_only(v: np.ndarray) -> np.ndarray:
    v.flags.writeable = False
    return v


def twice(v: np.ndarray) -> list[np.ndarray]:
    return [v[:500], v[:500]]


def unaligned(v: np.ndarray) -> np.ndarray:
    return np.frombuffer(bytearray(4 * SIZE + 1), np.uint8)[1:].view(np.float32)


# Of a good vector, what is given in its place; what is raised; and what its sentence says.
WRONG: dict[str, tuple[Callable[[np.ndarray], Any], type[Exception], str]] = {
    "two dimensions": (lambda v: v.reshape(2, 500), ValueError, r"shape \(2, 500\).*reshape"),
    "no dimension": (lambda v: v[:1].reshape(()), ValueError, r"shape \(\)"),
    "too short": (lambda v: v[:-1], ValueError, r"shape \(999,\)"),
    "too long": (lambda v: np.append(v, v), ValueError, r"shape \(2000,\)"),
    "double": (lambda v: v.astype(np.float64), TypeError, "float64.*float32"),
    "half": (lambda v: v.astype(np.float16), TypeError, "float16"),
    "whole numbers": (lambda v: v.astype(np.int64), TypeError, "int64"),
    "complex": (lambda v: v.astype(np.complex64), TypeError, "complex64"),
    "objects": (lambda v: v.astype(object), TypeError, "object"),
    "byte order": (lambda v: v.astype(">f4"), TypeError, ">f4"),
    "not contiguous": (lambda v: np.append(v, v)[::2], ValueError, "contiguous"),
    "backwards": (lambda v: v[::-1], ValueError, "contiguous"),
    "one number for all": (lambda v: np.broadcast_to(v[:1], SIZE), ValueError, "read-only"),
    "read-only": (read_only, ValueError, "read-only"),
    "not aligned": (unaligned, ValueError, "aligned"),
    "masked": (lambda v: np.ma.masked_less(v, 0), TypeError, "mask"),
    "no array": (lambda v: memoryview(v), TypeError, "memoryview"),
    "nothing": (lambda v: None, TypeError, "None"),
    "a type": (lambda v: np.ndarray, TypeError, "ndarray"),
    "no array in a list": (lambda v: [v[:999], 1.0], TypeError, "array 1 of the list.*float"),
    "double in a list": (lambda v: [v[:500], v[500:].astype(np.float64)], TypeError, "array 1 .*float64"),
    "numbers in a list": (lambda v: v.tolist(), TypeError, "array 0"),
    "empty list": (lambda v: [], ValueError, "0 arrays.*0 numbers"),
    "list too short": (lambda v: [v[:500], v[501:]], ValueError, "999 numbers"),
    "list too long": (lambda v: [v, v[:1].copy()], ValueError, "1001 numbers"),
    "not contiguous in a list": (lambda v: [v[::2], v[1::2]], ValueError, "contiguous"),
    "read-only in a list": (lambda v: [v[:500].copy(), read_only(v[500:])], ValueError, "array 1 .*read-only"),
    "the same array twice": (twice, ValueError, "arrays 0 and 1 .*share memory"),
    "overlapping arrays": (lambda v: [v[400:999], v[:401]], ValueError, "arrays 0 and 1 .*share memory"),
    "an iterator": (lambda v: iter([v]), TypeError, "iterator"),
}


@pytest.fixture(scope="module")
def shared(world: World) -> Any:
    """One for all wrong calls, as none of them ends it."""
    allreduce = distconv.Allreduce(world.comm, SIZE)
    yield allreduce
    allreduce.close()


def assert_works(allreduce: distconv.Allreduce, world: World) -> None:
    vector = allreduce.sum(np.full(allreduce.size, world.rank + 1, allreduce.wire.dtype))
    np.testing.assert_array_equal(vector, world.size * (world.size + 1) / 2)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_raises_the_same_on_all_ranks_and_changes_nothing(
    world: World, shared: distconv.Allreduce, case: str
) -> None:
    make, kind, sentence = WRONG[case]
    last = world.size - 1
    for wrong_on in ([last], range(world.size)):
        mine = contribution(world.rank)
        given = make(mine) if world.rank in wrong_on else mine
        with pytest.raises(kind, match=sentence) as caught:
            shared.mean(given)
        told = set(world.comm.allgather(str(caught.value)))
        assert len(told) == 1
        assert told.pop().startswith(f"rank {last}: ") == (len(wrong_on) < world.size)
        np.testing.assert_array_equal(mine, contribution(world.rank))
    assert_works(shared, world)


@pytest.mark.parametrize("exchange", ["flat", "two-level", "messages"])
@pytest.mark.parametrize(
    ("one", "others", "sentence"),
    [
        ("sum", "mean", r"rank 0 calls mean\(\) of a vector, rank \d calls sum\(\) of a vector"),
        ("list", "sum", r"rank 0 calls sum\(\) of a vector, rank \d calls sum\(\) of a list of shapes \(3, 100\)"),
        ("list", "other list", r"list of shapes \(500,\), \(500,\), rank \d calls .*list of shapes \(3, 100\)"),
    ],
)
def test_ranks_that_make_different_calls_all_raise_and_change_nothing(
    world: World, one: str, others: str, sentence: str, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if world.size == 1:
        pytest.skip("nobody to differ from")
    if exchange == "messages":
        monkeypatch.setattr(exchanges, "connect", transport.Messages)
        exchange = "flat"
    with distconv.Allreduce(world.comm, SIZE, exchange=exchange) as allreduce:
        vector = contribution(world.rank)
        parts = arrays(vector)
        calls = {
            "sum": lambda: allreduce.sum(vector),
            "mean": lambda: allreduce.mean(vector),
            "list": lambda: allreduce.sum(parts),
            "other list": lambda: allreduce.sum([vector[:500], vector[500:]]),
        }
        with pytest.raises(ValueError, match=sentence):
            calls[one if world.rank == world.size - 1 else others]()
        np.testing.assert_array_equal(vector, contribution(world.rank))
        np.testing.assert_array_equal(parts[2], arrays(vector)[2])
        assert_works(allreduce, world)


@pytest.mark.parametrize(
    ("wrong", "kind", "sentence"),
    [
        ({"size": 0}, ValueError, "size must be at least 1, not 0"),
        ({"size": -5}, ValueError, "not -5"),
        ({"size": 10.0}, TypeError, "whole number, not 10.0"),
        ({"size": None}, TypeError, "not None"),
        ({"wire": "float17"}, ValueError, "one of float16, .*'float17'"),
        ({"wire": None}, TypeError, "wire must be"),
        ({"exchange": "nccl"}, ValueError, "one of auto, flat, two-level"),
        ({"exchange": True}, TypeError, "exchange must be"),
    ],
)
@pytest.mark.parametrize("wrong_on", ["one rank", "all ranks"])
def test_a_wrong_setting_raises_the_same_on_all_ranks(
    world: World, wrong: dict[str, Any], kind: type[Exception], sentence: str, wrong_on: str
) -> None:
    settings = {"size": 10, "wire": "float16", "exchange": "auto"}
    if wrong_on == "all ranks" or world.rank == world.size - 1:
        settings |= wrong
    with pytest.raises(kind, match=sentence):
        distconv.Allreduce(world.comm, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("other", [{"size": 11}, {"wire": "float32"}, {"exchange": "two-level"}])
def test_ranks_that_disagree_about_a_setting_find_out_at_once(world: World, other: dict[str, Any]) -> None:
    if world.size == 1:
        pytest.skip("nobody to differ from")
    settings = {"size": 10, "wire": "float16", "exchange": "auto"}
    if world.rank == world.size - 1:
        settings |= other
    with pytest.raises(ValueError, match=f"disagree about {next(iter(other))}: .* on rank 0, .* on rank"):
        distconv.Allreduce(world.comm, **settings)  # type: ignore[arg-type]


def test_settings_that_say_the_same_are_the_same(world: World) -> None:
    size, wire = (10, "float16") if world.rank == 0 else (np.int64(10), np.str_("float16"))
    with distconv.Allreduce(world.comm, size, wire) as allreduce:  # type: ignore[arg-type]
        assert_works(allreduce, world)


def test_what_is_no_communicator_is_refused(world: World) -> None:
    freed = world.comm.Dup()
    freed.Free()
    for comm in (None, "COMM_WORLD", 7, MPI, MPI.Comm, world, MPI.GROUP_EMPTY):
        with pytest.raises(TypeError, match="must be a communicator"):
            distconv.Allreduce(comm, 10)  # type: ignore[arg-type]
    for comm in (freed, MPI.COMM_NULL):
        with pytest.raises(ValueError, match="COMM_NULL"):
            distconv.Allreduce(comm, 10)
    if world.size > 1:
        local = world.comm.Split(world.rank == 0)
        between = local.Create_intercomm(0, world.comm, 1 if world.rank == 0 else 0)
        with pytest.raises(TypeError, match="intercommunicator"):
            distconv.Allreduce(between, 10)
        between.Free()
        local.Free()


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


def test_a_second_thread_is_turned_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with distconv.Allreduce(world.comm, SIZE) as allreduce:
        within, refused = allreduce._exchange.sum, []

        def second() -> None:
            for call in (allreduce.sum, allreduce.mean):
                try:
                    call(contribution(0))
                except RuntimeError as error:
                    refused.append(str(error))

        def sum_with_company(*arguments: Any) -> Any:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
            return within(*arguments)

        monkeypatch.setattr(allreduce._exchange, "sum", sum_with_company)
        assert_works(allreduce, world)
        monkeypatch.undo()
        assert len(refused) == 2 and all("another thread" in sentence for sentence in refused)


def test_one_that_was_interrupted_does_not_go_on_out_of_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with distconv.Allreduce(world.comm, SIZE) as allreduce:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(allreduce._exchange, "sum", interrupted)
            allreduce.sum(contribution(0))
        with pytest.raises(RuntimeError, match="interrupted"):
            allreduce.sum(contribution(0))


@pytest.mark.parametrize("kind", ["flat", "two-level", "buckets", "mpi"])
def test_every_exchange_is_closed_for_good_and_can_be_closed_again(world: World, kind: str) -> None:
    exchange = choose.select(world.comm, SIZE, "float32", kind)
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
    monkeypatch.setattr(shared_memory, "cores_are_short", lambda comm: asleep)

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
