"""Which exchange a job uses: the one that is named, or the one that its hosts and its network call for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from distconv.comm.buckets import LEAST, Buckets
from distconv.comm.exact import ALL_WIRES, Exact, ExactWire
from distconv.comm.exchange import HEADER, Exchange, Flat, TwoLevel
from distconv.comm.mpi_allreduce import Library
from distconv.comm.shared_memory import mpi_of
from distconv.comm.wire import Wire
from distconv.errors import UsageError

if TYPE_CHECKING:
    from mpi4py import MPI

    from distconv.comm.world import World


def choose(
    world: World, size: int, wire: str, kind: str = "auto", header: np.dtype[Any] = HEADER, seed: int = 0,
    contributions: int = 0
) -> Exchange:  # fmt: skip
    """The exchange of a training run; see select. Raises UsageError, on all ranks alike, which names the flag."""
    try:
        return select(world.comm, size, wire, kind, header, True, seed, contributions)
    except ValueError as error:
        raise UsageError(f"--exchange {kind} --wire {wire}: {error}; or use --exchange auto") from None


def select(
    comm: MPI.Comm,
    size: int,
    wire: str,
    kind: str = "auto",
    header: np.dtype[Any] = HEADER,
    overlaps: bool = True,
    seed: int = 0,
    contributions: int = 0,
) -> Exchange:
    """The exchange of that kind for vectors (size,) on a communicator; collective.

    auto: two-level where it saves bytes between hosts, else in buckets where these are several and cross a network,
    else flat. overlaps: parts of the vector will be ready before others, which is what buckets are for. seed: of a
    wire that rounds at random. contributions: vectors of all ranks together, on an exact wire, where that is not one a
    rank. Raises ValueError, on all ranks alike, for a kind that these ranks cannot have.
    """
    form = ALL_WIRES[wire]
    if isinstance(form, ExactWire):
        if kind == "buckets":
            raise ValueError("whole numbers are made of all vectors at once, so no bucket is ready before the others")
        exact = replace(form, contributions=contributions or comm.size)
        return Exact(comm, size, exact, _select(comm, size, exact.numbers, kind, header, False, 0))
    return _select(comm, size, form, kind, header, overlaps, seed)


def _select(
    comm: MPI.Comm, size: int, wire: Wire, kind: str, header: np.dtype[Any], overlaps: bool, seed: int
) -> Exchange:
    if kind == "mpi":
        return Library(comm, size, wire, header)
    MPI = mpi_of(comm)
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    hosts = comm.allreduce(int(local.rank == 0))
    if kind == "two-level" or (kind == "auto" and comm.size > hosts > 1):
        try:
            return TwoLevel(comm, local, size, wire, header, seed)
        except ValueError:
            if kind == "two-level":
                local.Free()
                raise
    local.Free()
    threads = MPI.Query_thread() >= MPI.THREAD_SERIALIZED
    if kind == "buckets" and not threads:
        raise ValueError("this MPI does not let a thread send (MPI_THREAD_SERIALIZED)")
    crosses_network = kind == "auto" and hosts > 1 and threads and overlaps
    if kind == "buckets" or (crosses_network and size >= LEAST):
        return Buckets(size, lambda n, place: Flat(comm, n, wire, True, header, seed, place), header)
    return Flat(comm, size, wire, header=header, seed=seed)
