"""Which exchange a job uses: the one that the user names, or the one that its hosts and its network call for."""

from __future__ import annotations

from distconv.comm.buckets import BUCKET, Buckets
from distconv.comm.exchange import Exchange, Flat, TwoLevel
from distconv.comm.library import Library
from distconv.comm.wire import WIRES
from distconv.comm.world import World
from distconv.errors import UsageError


def choose(world: World, size: int, wire: str, kind: str = "auto") -> Exchange:
    """The exchange of that kind for vectors (size,); collective.

    auto: two-level where it saves bytes between hosts, else in buckets behind the backward pass where these are several
    and cross a network, else flat. Raises UsageError, on all ranks alike, for a kind that this job cannot have.
    """
    if kind == "mpi":
        return Library(world.comm, size, wire)
    if kind == "two-level" or (kind == "auto" and world.hosts > 1 and world.size > world.hosts):
        try:
            return TwoLevel(world.comm, world.local, size, WIRES[wire])
        except ValueError as error:
            if kind == "two-level":
                raise UsageError(f"--exchange two-level: {error}; use --exchange auto") from None
    if kind == "buckets" and not world.threads:
        raise UsageError("--exchange buckets: this MPI does not let a thread send (MPI_THREAD_SERIALIZED); use auto")
    crosses_network = kind == "auto" and world.hosts > 1 and world.threads
    if kind == "buckets" or (crosses_network and size >= 2 * BUCKET):
        return Buckets(size, lambda n: Flat(world.comm, n, WIRES[wire], patient=True))
    return Flat(world.comm, size, WIRES[wire])
