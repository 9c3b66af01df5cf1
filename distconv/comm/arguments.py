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
from distconv.kernels.interface import Array

if TYPE_CHECKING:
    from mpi4py import MPI

EXCHANGES = ("auto", "flat", "two-level")
KINDS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}  # others become RuntimeError


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


def check_settings(comm: MPI.Comm, size: Any, wire: Any, exchange: Any) -> None:
    """Raise the same TypeError or ValueError on all ranks where one of them has a wrong setting, or another one."""
    problem, settings = None, ("", "", "")
    try:
        settings = _own_settings(size, wire, exchange)
    except (TypeError, ValueError) as error:
        problem = type(error).__name__, str(error)
    everyone = comm.allgather((problem, *settings))
    if failure := first_failure([told[0] for told in everyone]):
        raise failure
    for position, name in enumerate(("size", "wire", "exchange"), 1):
        values = [told[position] for told in everyone]
        rank = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if rank is not None:
            raise ValueError(f"ranks disagree about {name}: {values[0]} on rank 0, {values[rank]} on rank {rank}")


def _own_settings(size: Any, wire: Any, exchange: Any) -> tuple[str, str, str]:
    try:
        number = operator.index(size)
    except TypeError:
        raise TypeError(f"size must be a whole number, not {size!r}") from None
    if number < 1:
        raise ValueError(f"size must be at least 1, not {number}")
    for name, value, known in (("wire", wire, tuple(ALL_WIRES)), ("exchange", exchange, EXCHANGES)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be one of {', '.join(known)}, not {_kind(value)}")
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    return str(number), str(wire), str(exchange)


def first_failure(problems: Sequence[tuple[str, str] | None]) -> Exception | None:
    """The exception for the first problem, of those that the ranks have. A problem: kind and sentence, or None."""
    for rank, problem in enumerate(problems):
        if problem is not None:
            kind, sentence = problem
            alike = problems.count(problem) == len(problems)
            return KINDS.get(kind, RuntimeError)(sentence if alike else f"rank {rank}: {sentence}")
    return None


def check_vector(vector: Any, size: int, dtype: np.dtype[Any]) -> Array:
    """Return a vector (size,) that can be summed in place; raise TypeError or ValueError for all else."""
    if not isinstance(vector, np.ndarray):
        raise TypeError(f"a NumPy array is expected, or a list of arrays, not {_kind(vector)}: give its NumPy array")
    _check_array(vector, dtype, "the vector")
    if vector.shape != (size,):
        advice = "give vector.reshape(-1), or a list of arrays" if vector.size == size else "its size is fixed"
        raise ValueError(f"the vector has shape {vector.shape}, but ({size},) is expected: {advice}")
    if not vector.flags.c_contiguous:
        raise ValueError("the vector is not contiguous, but it is summed in place: give a contiguous copy")
    return vector


def check_arrays(arrays: Sequence[Any], size: int, dtype: np.dtype[Any]) -> list[tuple[int, ...]]:
    """The shapes of a list of arrays of `size` numbers together. Raises as check_vector does."""
    spans = []
    for number, array in enumerate(arrays):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"array {number} of the list must be a NumPy array, not {_kind(array)}")
        _check_array(array, dtype, f"array {number} of the list")
        if not array.flags.forc:
            raise ValueError(f"array {number} of the list is not contiguous: give a contiguous copy")
        start = array.__array_interface__["data"][0]
        spans.append((start, start + array.nbytes, number))
    total = sum(array.size for array in arrays)
    if total != size:
        raise ValueError(f"the {len(spans)} arrays of the list have {total} numbers together, but size is {size}")
    spans = sorted(span for span in spans if span[0] < span[1])
    for (_, end, one), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(f"arrays {min(one, other)} and {max(one, other)} of the list share memory: give it once")
    return [array.shape for array in arrays]


def _check_array(array: Array, dtype: np.dtype[Any], name: str) -> None:
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype}, but this wire sums {dtype}: convert it, or use another wire")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored: give its data, as array.filled(0)")
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only, but it is summed in place: give a copy")
    if not array.flags.aligned:
        raise ValueError(f"{name} is not aligned in memory: give a copy")


def _kind(value: Any) -> str:
    return f"{value!r}" if value is None or isinstance(value, str | type) else f"a {type(value).__name__}"
