"""The sum of the ranks' vectors under anybody's own script: `distconv.Allreduce`.

It takes nothing of the process: no settings, no threads, no start of MPI. It talks on a duplicate of the communicator
that it is given, so what it sends never meets what the script sends.

A rank that calls with a wrong argument must not leave the others waiting. So it takes part all the same, and says in
the header that travels with the numbers anyway that its call is void; then no rank changes a vector, all ranks tell one
another what was wrong, and all raise the same. It costs a good call nothing. A rank that leaves does the same, which
the others learn in their next call.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from distconv.comm.arguments import (
    Shapes,
    agreed_settings,
    check_arrays,
    check_communicator,
    check_vector,
    different_calls,
    first_failure,
    problem_of,
)
from distconv.comm.choose import select
from distconv.comm.exchange import Headers
from distconv.comm.shared_memory import mpi_of
from distconv.comm.wire import Wire
from distconv.errors import sentence_of
from distconv.kernels.interface import BLOCK, Array

if TYPE_CHECKING:
    from mpi4py import MPI

CALL = np.dtype(
    [
        ("bad_at", np.int64),  # where this rank's vector first holds an infinity or NaN, or -1
        ("step", np.int64),  # how many calls there were: another one, for a wire that rounds at random
        ("call", np.uint64),  # what it calls: the act, and above its bits a number made of a list's shapes
        ("busy_seconds", np.float64),  # since its last call returned
    ]
)
SUM, MEAN, VOID, LEAVE = range(4)  # acts: a void call is one with a wrong argument
SHIFT, ACT = 2, 3  # an act's bits, and a mask of them
CLOSED = "this Allreduce is closed: make another one"
INTERRUPTED = "a call of this Allreduce was interrupted, so its ranks are out of step: make another one"
SAMPLE = 8 * BLOCK  # numbers of a vector that tell what rounding costs
PROCESS = os.urandom(16)  # tells this process from all others
Told = tuple[str, str, Shapes | None]  # what ranks say of themselves where a call ends, see _end
_log = logging.getLogger("distconv")
Vectors = TypeVar("Vectors", bound="Array | Sequence[Array]")


@dataclass(frozen=True)
class NotFinite:
    """The first number of a rank's contribution that is infinite or not a number.

    array: its place in the list, 0 for a vector; index: within that array.
    """

    rank: int
    array: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What one call did, seen from this rank.

    bytes_sent: to other ranks; on one host, through memory that they share. seconds: of the whole call. waited: seconds
    of them for the slowest rank, or for a core that several ranks share. not_finite: one entry for each rank whose
    contribution is not finite; the sum of finite numbers may still be too large for the dtype.
    """

    bytes_sent: int
    seconds: float
    waited: float
    not_finite: tuple[NotFinite, ...]
    _sample: Array = field(repr=False, compare=False)
    _wire: Wire = field(repr=False, compare=False)

    @property
    def exchanged(self) -> float:
        """Seconds of the call in which this rank did not wait for others."""
        return self.seconds - self.waited

    @functools.cached_property
    def rounding(self) -> float:
        """What the wire loses of this rank's contribution x on its way out: |arrived - x| / |x|, of what is finite.

        Computed when first asked for, from 2,048 numbers that lie behind one another, in each call the next ones. The
        sum is rounded once more, by as much, on its way back.
        """
        with np.errstate(all="ignore"):
            arrived = self._wire.round_trip(self._sample)
            finite = np.isfinite(self._sample) & np.isfinite(arrived)
            x, y = self._sample[finite].astype(np.float64), arrived[finite]
            lost = float(np.linalg.norm(y - x))
            return lost / float(np.linalg.norm(x)) if lost else 0.0


class Allreduce:
    """Sums vectors of `size` numbers over the ranks of a communicator, in place, to the same bits on every rank.

    comm: an intracommunicator of mpi4py. All of its ranks make the object, call its methods in the same order, and
    close it. size: numbers of all arrays of a call together. wire: what a number is as it travels: float16 (2 bytes,
    scaled by powers of two, so nothing overflows), int8 (1 byte, for slow links: rounded at random, right in the mean),
    float32, float64, or int16 and int32 (whole numbers on a grid that all ranks share, whose sum does not hang on the
    order of the ranks). Vectors are float32, for the float64 wire float64, and so are the sums, in rank order.
    exchange: auto; flat: each rank with each; two-level: on each host first.

    how: the exchange in words. A context manager.

    Raises TypeError or ValueError, on all ranks alike, for a wrong size, wire or exchange, or where ranks differ in
    them, and MemoryError where one has no room for so many numbers; on this rank alone for what is no communicator.
    """

    def __init__(self, comm: MPI.Comm, size: int, wire: str = "float16", exchange: str = "auto") -> None:
        check_communicator(comm)
        self._comm = comm.Dup()
        try:
            self.size, wire, exchange = agreed_settings(self._comm, size, wire, exchange)
            self._exchange = select(self._comm, self.size, wire, exchange, CALL, overlaps=False)
        except (TypeError, ValueError, MemoryError):  # on all ranks alike, as it takes all to free it
            self._comm.Free()
            raise
        self.wire, self.how = self._exchange.wire, self._exchange.how
        # The numbers of a list, behind one another, and the vector of a void call. The system gives it memory when it
        # is first used; to ask for it then might fail on this rank alone, and leave the others waiting.
        self._gathered = np.zeros(self.size, self.wire.dtype)
        self._noted: tuple[Any, ...] | None = None  # of the last call, for its report
        self._calls = 0
        self._MPI, self._process, self._lock = mpi_of(comm), os.getpid(), threading.Lock()
        self._main_only = self._MPI.Query_thread() < self._MPI.THREAD_SERIALIZED
        self._ended = ""  # why there are no calls any more
        self._shapes: list[tuple[int, ...]] = []  # of the last list, from which _layout was made
        self._layout = 0
        self.wire.warm_up()
        # Who they are, for an error that is raised on all of them; and so that compiling is not taken for waiting.
        self._ranks = frozenset(self._comm.allgather(PROCESS))
        self._returned = time.perf_counter()

    def sum(self, vector: Vectors) -> Vectors:
        """Replace the numbers by their sum over all ranks.

        vector: (size,), contiguous, writable, of the wire's dtype; or a list or tuple of arrays of any shapes, the same
        on all ranks, that are contiguous in C's or Fortran's order, share no memory, and have `size` numbers together.
        Returns it. Infinities and NaN are summed as they are, and told of in `last`.

        Raises, on all ranks alike and with all arrays as they were: TypeError or ValueError where one rank's argument
        is wrong or the ranks do not make the same call; RuntimeError where one has closed this object. RuntimeError on
        this rank alone where this object is closed, or in use by another thread.
        """
        return self._call(vector, SUM)

    def mean(self, vector: Vectors) -> Vectors:
        """Replace the numbers by their mean over all ranks; all else as for sum."""
        return self._call(vector, MEAN)

    @property
    def last(self) -> Report | None:
        """What the last call that gave a sum did; None before."""
        if self._noted is None:
            return None
        headers, began, ended, busy, slept, sample, shapes = self._noted
        waited = min(ended - began, max(float(headers["busy_seconds"].max()) - busy, slept))
        bad = _not_finite(headers["bad_at"].tolist(), shapes or [(self.size,)])
        return Report(self._exchange.bytes_sent, ended - began, waited, bad, sample, self.wire)

    def close(self) -> None:
        """Give back memory and communicator; all ranks must. Does nothing the second time.

        A rank that sums meanwhile gets a RuntimeError, and this object is closed on all ranks.
        """
        self._leave("has closed it")

    def __enter__(self) -> Allreduce:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self._ranks <= getattr(error, "allreduce_ranks", frozenset()):
            return self.close()
        how = f"has left its `with` block by {sentence_of(error)}"
        if not self._is_over() and self._comm.size > 1 and os.getpid() == self._process:
            # Should the others never call again, this rank waits for ever, and its traceback is never seen.
            _log.warning("Allreduce: rank %d %s; it waits for the others' next call", self._comm.rank, how)
        return self._leave(how)

    def _call(self, vectors: Vectors, act: int) -> Vectors:
        self._enter()
        try:
            began, asleep = time.perf_counter(), self._exchange.waited
            problem, layout = None, 0
            arrays: list[Array] | None = None
            try:
                if isinstance(vectors, list | tuple):
                    arrays = check_arrays(vectors, self.size, self.wire.dtype)
                    vector, layout = self._gather(arrays), self._layout
                else:
                    vector = check_vector(vectors, self.size, self.wire.dtype)
            except Exception as error:  # whatever a user's sequence does
                problem, vector, act = problem_of(error), self._gathered, VOID
            sample = self._sample(vector)
            busy = began - self._returned
            headers = self._travel(vector, layout << SHIFT | act, busy)
            if is_void(headers):
                self._end(headers, act, (*(problem or ("", "")), self._shapes if arrays else None))
            if act == MEAN:
                with np.errstate(under="ignore"):
                    vector /= self._comm.size
            if arrays is not None:
                self._scatter(arrays)
            self._returned = time.perf_counter()
            slept = self._exchange.waited - asleep
            self._noted = headers, began, self._returned, busy, slept, sample, arrays and self._shapes
            return vectors
        finally:
            self._lock.release()

    def _enter(self) -> None:
        """Begin a call; _lock is to be released at its end. Raises RuntimeError, on this rank alone.

        Until it has come to its end, there are no others: a rank that was interrupted would be one call behind.
        """
        if os.getpid() != self._process:
            raise RuntimeError("a forked process is no rank: call this Allreduce in the process that made it")
        if self._main_only and not self._MPI.Is_thread_main():
            raise RuntimeError("this MPI lets only the main thread call it (MPI_THREAD_FUNNELED)")
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("another thread is in a call of this Allreduce: make one call at a time")
        if self._is_over():
            self._lock.release()
            raise RuntimeError(self._ended or "MPI has ended, and with it this Allreduce")
        self._ended = INTERRUPTED

    def _is_over(self) -> bool:
        return bool(self._ended) or self._MPI.Is_finalized()

    def _travel(self, vector: Array, call: int, busy: float) -> Headers:
        header = np.array((-1, self._calls, call, busy), CALL)
        with np.errstate(all="ignore"):  # a script that lets NumPy raise would raise on this rank alone, in the middle
            headers = self._exchange.sum(vector, header, is_void)
        self._ended = ""
        return headers

    def _end(self, headers: Headers, act: int, told: Told) -> None:
        """Let all ranks tell what they did, and raise what ends the call of all; returns where this rank leaves.

        told: the kind and the sentence of a problem, or no kind and how this rank leaves; the shapes of its list.
        """
        self._ended = INTERRUPTED
        acts = [call & ACT for call in headers["call"].tolist()]
        everyone = self._comm.allgather(told)
        if LEAVE in acts:
            self._exchange.close()
            self._comm.Free()
        self._ended = CLOSED if LEAVE in acts else ""
        if act == LEAVE:
            return
        failure = _failure(acts, everyone)
        failure.allreduce_ranks = self._ranks  # type: ignore[attr-defined]  # none need tell the others of it
        raise failure

    def _leave(self, how: str) -> None:
        if os.getpid() != self._process or (self._is_over() and not self._lock.locked()):
            self._ended = self._ended or CLOSED
            return
        self._enter()
        try:
            headers = self._travel(self._gathered, LEAVE, 0.0)
            self._end(headers, LEAVE, ("", how, None))
        finally:
            self._lock.release()

    def _gather(self, arrays: Sequence[Array]) -> Array:
        """The numbers of the arrays, behind one another."""
        shapes = [array.shape for array in arrays]
        if shapes != self._shapes:
            self._shapes, self._layout = shapes, zlib.crc32(repr(shapes).encode()) + 1  # 0 is that of a vector
        for array, place in zip(arrays, self._places(), strict=True):
            place[...] = array
        return self._gathered

    def _scatter(self, arrays: Sequence[Array]) -> None:
        for array, place in zip(arrays, self._places(), strict=True):
            array[...] = place

    def _places(self) -> Iterator[Array]:
        """Where each array of the list lies in _gathered, in its shape."""
        start = 0
        for shape in self._shapes:
            size = math.prod(shape)
            yield self._gathered[start : start + size].reshape(shape)
            start += size

    def _sample(self, vector: Array) -> Array:
        self._calls += 1
        start = self._calls * SAMPLE % -(-self.size // SAMPLE * SAMPLE)
        return vector[start : start + SAMPLE].copy()


def _not_finite(bad_at: list[int], shapes: Sequence[tuple[int, ...]]) -> tuple[NotFinite, ...]:
    """The entries of a report. bad_at: of each rank, -1 where all is finite; shapes: of the arrays."""
    found = []
    for rank, index in enumerate(bad_at):
        number = 0
        if index >= 0:
            while index >= math.prod(shapes[number]):
                index -= math.prod(shapes[number])
                number += 1
            found.append(NotFinite(rank, number, tuple(map(int, np.unravel_index(index, shapes[number])))))
    return tuple(found)


def is_void(headers: Headers) -> bool:
    """Whether a rank's argument is wrong, or one leaves, or they do not make the same call."""
    calls: list[int] = headers["call"].tolist()
    return calls[0] & ACT >= VOID or calls.count(calls[0]) < len(calls)


def _failure(acts: Sequence[int], everyone: Sequence[Told]) -> Exception:
    """What ends a call. everyone: what each rank tells, see _end."""
    if LEAVE in acts:
        rank = acts.index(LEAVE)
        return RuntimeError(f"rank {rank} {everyone[rank][1]}: this Allreduce is closed on all ranks")
    failure = first_failure([(kind, sentence) if kind else None for kind, sentence, _ in everyone])
    return failure or different_calls([(act == MEAN, told[2]) for act, told in zip(acts, everyone, strict=True)])
