"""What Allreduce takes, and what it says of everything else: one sentence each.

A check of a call is this rank's own, and quick, as it is made in every call. Those of the settings are collective.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distconv.comm.exact import ALL_WIRES
from distconv.errors import sentence_of, text_of
from distconv.kernels.interface import Array

if TYPE_CHECKING:
    from mpi4py import MPI

EXCHANGES = ("auto", "flat", "two-level")
# Others become RuntimeError.
KINDS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError, "MemoryError": MemoryError}


def check_communicator(comm: Any) -> None:
    """Raise TypeError, ValueError or RuntimeError for what no Allreduce can be made on."""
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is None or not isinstance(comm, MPI.Comm):
        raise TypeError(f"comm must be a communicator of mpi4py, such as MPI.COMM_WORLD, not {_kind(comm)}")
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise RuntimeError("MPI is not running: make an Allreduce after MPI.Init() and before MPI.Finalize()")
    if comm == MPI.COMM_NULL:
        raise ValueError("comm is MPI.COMM_NULL: it was freed, or this rank is not one of its ranks")
    if comm.Is_inter():
        raise TypeError("comm is an intercommunicator: give an intracommunicator, such as comm.Merge()")


def agreed_settings(comm: MPI.Comm, size: Any, wire: Any, exchange: Any) -> tuple[int, str, str]:
    """The settings, of Python's own types. Raises the same on all ranks where one of them has a wrong one, or another.

    TypeError or ValueError; MemoryError where one has no room for it: to find that out later would leave the others
    waiting.
    """
    problem, settings = None, (0, "", "")
    try:
        settings = _own_settings(size, wire, exchange)
        _look_for_room(settings[0], settings[1], comm.size)
    except (TypeError, ValueError, MemoryError) as error:
        problem = problem_of(error)
    except Exception as error:  # of a user's own class
        problem = "TypeError", f"a setting cannot be read: {sentence_of(error)}"
    everyone = comm.allgather((problem, *settings))
    if failure := first_failure([told[0] for told in everyone]):
        raise failure
    for position, name in enumerate(("size", "wire", "exchange"), 1):
        values = [told[position] for told in everyone]
        rank = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if rank is not None:
            raise ValueError(f"ranks disagree about {name}: {values[0]} on rank 0, {values[rank]} on rank {rank}")
    return settings


def _own_settings(size: Any, wire: Any, exchange: Any) -> tuple[int, str, str]:
    try:
        number = operator.index(size)
    except TypeError:
        shown = repr(size) if isinstance(size, float) else _kind(size)
        hint = " (is its .size meant?)" * hasattr(size, "size")
        raise TypeError(f"size must be a whole number, not {shown}{hint}") from None
    if number < 1:
        raise ValueError(f"size must be at least 1, not {number}")
    for name, value, known in (("wire", wire, tuple(ALL_WIRES)), ("exchange", exchange, EXCHANGES)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be one of {', '.join(known)}, not {_kind(value)}")
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    return number, str.__str__(wire), str.__str__(exchange)  # str() of an enumeration's member gives another text


def _look_for_room(size: int, wire: str, ranks: int) -> None:
    """Raise MemoryError where this rank may not have the memory of a vector and of its messages.

    These are from all, to all and what is read.
    """
    of_wire = ALL_WIRES[wire]
    needed = (3 if ranks > 1 else 1) * of_wire.nbytes(size) + size * of_wire.dtype.itemsize
    try:
        np.empty(needed, np.uint8)  # is not touched, so it costs no time
    except (MemoryError, ValueError):
        sentence = f"size {size:,}: this process cannot have the {needed:,} bytes that a vector and its messages take"
        raise MemoryError(sentence) from None


Problem = tuple[str, str]  # kind of an exception, and its sentence
Shapes = list[tuple[int, ...]]  # of the arrays of a list


def problem_of(error: Exception) -> Problem:
    """What other ranks are told of an exception."""
    return type(error).__name__, text_of(error)


def first_failure(problems: Sequence[Problem | None]) -> Exception | None:
    """The exception for the first problem, of those that the ranks have, if any has one."""
    for rank, problem in enumerate(problems):
        if problem is not None:
            kind, sentence = problem
            alike = problems.count(problem) == len(problems)
            return KINDS.get(kind, RuntimeError)(sentence if alike else f"rank {rank}: {sentence}")
    return None


def different_calls(calls: Sequence[tuple[bool, Shapes | None]]) -> ValueError:
    """The error where not all ranks make the same call.

    calls: of each rank, whether it is mean, and the shapes of its list, if it is one.
    """
    other = next((rank for rank, call in enumerate(calls) if call != calls[0]), 0)
    both = itertools.zip_longest(calls[0][1] or (), calls[other][1] or ())
    first = next((number for number, (one, two) in enumerate(both) if one != two), 0)
    told = [_described(*calls[rank], first) for rank in (0, other)]
    return ValueError(f"ranks make different calls: rank 0 calls {told[0]}, rank {other} calls {told[1]}")


def _described(is_mean: bool, shapes: Shapes | None, first: int) -> str:
    """A call, its list from that array on."""
    what = "a vector"
    if shapes is not None:
        told = ", ".join(map(str, shapes[first:]))
        from_there = f", from array {first} on" if first else ""
        what = f"a list of shapes {told[:200]}{'...' * (len(told) > 200)}{from_there}" if told else f"{first} arrays"
    return f"{'mean' if is_mean else 'sum'}() of {what}"


def check_vector(vector: Any, size: int, dtype: np.dtype[Any]) -> Array:
    """Return a vector (size,) that can be summed in place; raise TypeError or ValueError for all else.

    What is returned, and looked at, is NumPy's own view of it: methods of a subclass, which may raise, must not run on
    one rank in the middle of a call, and its attributes may say what is not so.
    """
    if not isinstance(vector, np.ndarray):
        raise TypeError(f"a NumPy array is expected, or a list of arrays, not {_kind(vector)}: give its NumPy array")
    vector = _numpys_view(vector, dtype, "the vector")
    if vector.shape != (size,):
        advice = "give vector.reshape(-1), or a list of arrays" if vector.size == size else "its size is fixed"
        raise ValueError(f"the vector has shape {vector.shape}, but ({size},) is expected: {advice}")
    if not vector.flags.c_contiguous:
        raise ValueError("the vector is not contiguous, but it is summed in place: give a contiguous copy")
    return vector  # type: ignore[no-any-return]


def check_arrays(arrays: Sequence[Any], size: int, dtype: np.dtype[Any]) -> list[Array]:
    """The arrays of a list that have `size` numbers together, as NumPy's own views. Raises as check_vector does."""
    spans, views = [], []
    for number, array in enumerate(arrays):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"array {number} of the list must be a NumPy array, not {_kind(array)}")
        view = _numpys_view(array, dtype, f"array {number} of the list")
        if not view.flags.forc:
            raise ValueError(f"array {number} of the list is not contiguous: give a contiguous copy")
        start = view.__array_interface__["data"][0]
        spans.append((start, start + view.nbytes, number))
        views.append(view)
    total = sum(view.size for view in views)
    if total != size:
        raise ValueError(f"the {len(spans)} arrays of the list have {total} numbers together, but size is {size}")
    spans = sorted(span for span in spans if span[0] < span[1])
    for (_, end, one), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(f"arrays {min(one, other)} and {max(one, other)} of the list share memory: give it once")
    return views


def _numpys_view(array: Array, dtype: np.dtype[Any], name: str) -> Array:
    """NumPy's own view of an array, of whatever subclass; raise TypeError or ValueError where it cannot be summed."""
    is_masked, array = isinstance(array, np.ma.MaskedArray), np.asarray(array)
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype}, but this wire sums {dtype}: convert it, or use another wire")
    if is_masked:
        raise TypeError(f"{name} is a masked array, whose mask would be ignored: give its data, as array.filled(0)")
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only, but it is summed in place: give a copy")
    if not array.flags.aligned:
        raise ValueError(f"{name} is not aligned in memory: give a copy")
    return array


def _kind(value: Any) -> str:
    return f"{value!r}" if value is None or isinstance(value, str | type) else f"a {type(value).__name__}"
