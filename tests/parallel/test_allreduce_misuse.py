"""distconv.Allreduce, used wrongly: all ranks get the same exception, nothing is changed, and nobody hangs."""

from __future__ import annotations

import contextlib
import enum
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import distconv
from distconv.comm import exact, transport
from distconv.comm import exchange as exchanges
from distconv.comm.world import World
from tests.parallel.allreduce import SIZE, arrays, assert_works, contribution


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
    "an array that tells another shape": (lambda v: v[:-1].view(Liar), ValueError, r"shape \(999,\)"),
    "an array in a list that tells another size": (lambda v: [v[:-1].view(Liar)], ValueError, "999 numbers"),
    "an iterator": (lambda v: iter([v]), TypeError, "iterator"),
}


@pytest.fixture(scope="module")
def shared(world: World) -> Any:
    """One for all wrong calls, as none of them ends it."""
    allreduce = distconv.Allreduce(world.comm, SIZE)
    yield allreduce
    allreduce.close()


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


class SpeechlessError(Exception):
    """One whose text raises: a mistake that is easily made."""

    def __str__(self) -> str:
        raise AttributeError("no attribute msg")


class Hostile(list):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        raise SpeechlessError


def test_an_exception_without_a_text_is_told_all_the_same(world: World, shared: distconv.Allreduce) -> None:
    mine = contribution(world.rank)
    with pytest.raises(RuntimeError, match="its text cannot be had"):
        shared.sum(Hostile([mine]) if world.rank == world.size - 1 else mine)
    assert_works(shared, world)
    if world.size > 1:
        with pytest.raises((SpeechlessError, RuntimeError)) as caught, distconv.Allreduce(world.comm, SIZE) as one:
            if world.rank == world.size - 1:
                raise SpeechlessError
            one.sum(mine)
        assert world.rank == world.size - 1 or "by SpeechlessError: its text cannot be had" in str(caught.value)


class Stubborn(np.ndarray):
    """Values that only go among their own kind, as arrays with physical units do."""

    def __getitem__(self, key: Any) -> Any:
        raise ZeroDivisionError("a method of one rank's array")

    __setitem__ = __itruediv__ = __getitem__  # type: ignore[assignment]


class Liar(np.ndarray):
    """Tells of another array than it is, as one that hides a border of zeros does."""

    shape = property(lambda self: (SIZE,))  # type: ignore[assignment]
    size = nbytes = property(lambda self: SIZE)  # type: ignore[assignment]


class ReadOnce(list):  # type: ignore[type-arg]
    """A list that can be read once."""

    def __iter__(self) -> Any:
        items, self[:] = list(super().__iter__()), []
        return iter(items)


@pytest.mark.parametrize("form", ["a vector", "a list", "a list that can be read once"])
def test_methods_of_a_users_own_class_end_no_call_on_one_rank_alone(
    world: World, shared: distconv.Allreduce, form: str
) -> None:
    mine = contribution(world.rank)
    own = mine.view(Stubborn) if world.rank == world.size - 1 else mine
    shared.mean({"a vector": own, "a list": [own], "a list that can be read once": ReadOnce([own])}[form])
    wanted = np.mean([contribution(rank) for rank in range(world.size)], axis=0)
    np.testing.assert_allclose(mine, wanted, atol=4e-3)
    assert_works(shared, world)


@pytest.mark.parametrize("exchange", ["flat", "two-level", "messages"])
@pytest.mark.parametrize(
    ("one", "others", "sentence"),
    [
        ("sum", "mean", r"rank 0 calls mean\(\) of a vector, rank \d calls sum\(\) of a vector"),
        ("list", "sum", r"rank 0 calls sum\(\) of a vector, rank \d calls sum\(\) of a list of shapes \(3, 100\)"),
        ("list", "other list", r"list of shapes \(500,\), \(500,\), rank \d calls .*list of shapes \(3, 100\)"),
        ("long", "other long", r"shapes \(2,\), \(818,\), from array 90 on, rank [1-9] .* \(1,\), .*from array 90 on"),
        ("long", "longer", r"shapes \(0,\), from array 92 on, rank [1-9] calls sum\(\) of 92 arrays"),
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
            "long": lambda: allreduce.sum(np.split(vector, [*range(2, 182, 2), 181])),
            "other long": lambda: allreduce.sum(np.split(vector, [*range(2, 182, 2), 182])),
            "longer": lambda: allreduce.sum(np.split(vector, [*range(2, 182, 2), 181, SIZE])),
        }
        with pytest.raises(ValueError, match=sentence):
            calls[one if world.rank == world.size - 1 else others]()
        np.testing.assert_array_equal(vector, contribution(world.rank))
        np.testing.assert_array_equal(parts[2], arrays(vector)[2])
        assert_works(allreduce, world)


class OddNumber:
    def __index__(self) -> int:
        raise OSError("no number today")


class OddName(str):
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError("no name is like me")

    __hash__ = str.__hash__


@pytest.mark.parametrize(
    ("wrong", "kind", "sentence"),
    [
        ({"size": OddNumber()}, TypeError, "a setting cannot be read: OSError: no number today"),
        ({"wire": OddName("float16")}, TypeError, "a setting cannot be read: ZeroDivisionError: no name is like me"),
        ({"size": 0}, ValueError, "size must be at least 1, not 0"),
        ({"size": -5}, ValueError, "not -5"),
        ({"size": 10.0}, TypeError, "whole number, not 10.0"),
        ({"size": None}, TypeError, "not None"),
        ({"size": np.zeros(999)}, TypeError, r"not a ndarray \(is its \.size meant\?\)$"),
        ({"size": 10**14}, MemoryError, "size 100,000,000,000,000: .*bytes"),
        ({"size": 2**63}, MemoryError, "bytes"),
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


@pytest.mark.parametrize("wire", ["float16", "int32"])
@pytest.mark.parametrize("carrier", ["shared memory", "messages"])
def test_where_one_rank_lacks_the_memory_all_hear_of_it(
    world: World, wire: str, carrier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if carrier == "messages":
        monkeypatch.setattr(exchanges, "connect", transport.Messages)
        monkeypatch.setattr(exact, "connect", transport.Messages)
    lacking = pytest.raises(MemoryError, match="size 300,000,000: this process cannot have")
    with on_the_last_rank_no_more_than(256 << 20, world), lacking:
        distconv.Allreduce(world.comm, 300_000_000, wire)


@pytest.mark.parametrize("call", ["a list", "a wrong argument", "close"])
def test_no_call_needs_memory_that_one_rank_may_lack(world: World, call: str) -> None:
    size = 20_000_000
    allreduce = distconv.Allreduce(world.comm, size)
    vector = np.zeros(size, np.float32)
    with on_the_last_rank_no_more_than(size, world):  # bytes: a quarter of a vector
        if call == "a list":
            allreduce.sum([vector])
        if call == "a wrong argument":
            with pytest.raises(ValueError, match="shape"):
                allreduce.sum(vector[:-1] if world.rank == world.size - 1 else vector)
        allreduce.close()


@contextlib.contextmanager
def on_the_last_rank_no_more_than(nbytes: int, world: World) -> Iterator[None]:
    """Within it, the last rank is given no more memory than so much besides what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if world.rank == world.size - 1:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class WireName(str, enum.Enum):
    HALF = "float16"


@pytest.mark.parametrize("other", [np.str_("float16"), WireName.HALF])
def test_settings_that_say_the_same_are_the_same(world: World, other: str) -> None:
    size, wire = (10, "float16") if world.rank > 0 else (np.int64(10), other)
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


def test_a_second_thread_is_turned_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with distconv.Allreduce(world.comm, SIZE) as allreduce:
        within, refused = allreduce._exchange.sum, []

        def second() -> None:
            for call in (allreduce.sum, allreduce.mean, lambda vector: allreduce.close()):
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
        assert len(refused) == 3 and all("another thread" in sentence for sentence in refused)
