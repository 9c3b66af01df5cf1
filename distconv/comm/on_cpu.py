"""The sum over the ranks of gradients that lie on devices: what a step asks for, and how the host does it.

on_gpu.py has the ways of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from distconv.comm.buckets import Buckets
from distconv.comm.exchange import Exchange, Headers
from distconv.comm.wire import Wire
from distconv.kernels.interface import FINITE, Array


class DeviceExchange(Protocol):
    """Sums vectors of one size over the ranks, where each rank's device holds them: a GPU, or the host itself."""

    wire: Wire
    how: str
    bytes_sent: int  # by this rank in one sum, to other ranks
    bus_bytes: int  # that cross the bus of this rank's GPU in one sum, both ways; 0 on the CPU
    needs_no_host: bool  # before and after do everything but the headers

    def before(self, vector: Array, bad: Array) -> None:
        """Start what comes before travel. bad (2,) int32: where this rank's vector and the sum are first not finite."""
        ...

    def travel(self, header: Headers) -> Headers:
        """What the host does, when the device has done what came before. Returns the headers (P,) in rank order.

        header: that of this rank, with the bad_at that was found before.
        """
        ...

    def after(self, vector: Array, bad: Array) -> None:
        """Start what comes after travel: vector becomes the sum, the same bits on each rank."""
        ...

    @property
    def waited(self) -> float:
        """Seconds that this rank has slept in barriers, in all sums together."""
        return 0.0

    overlaps: bool = False  # parts of a vector may be on their way before it is whole; sender sends them

    def sender(self, vector: Array, step: int) -> Callable[[int | None], None] | None:
        """What sends off the numbers of the vector from an index on, when they are final; None where nothing can."""
        return None


class OnCpu(DeviceExchange):
    """By an exchange of the host, on the vector itself."""

    needs_no_host, bus_bytes = False, 0

    def __init__(self, inner: Exchange) -> None:
        self.inner, self.wire, self.how, self.bytes_sent = inner, inner.wire, inner.how, inner.bytes_sent
        self.overlaps = isinstance(inner, Buckets)

    @property
    def waited(self) -> float:
        return self.inner.waited

    def sender(self, vector: Array, step: int) -> Callable[[int | None], None] | None:
        inner = self.inner
        if not isinstance(inner, Buckets):
            return None
        return lambda start: None if start is None else inner.ready(vector, start, step)

    def before(self, vector: Array, bad: Array) -> None:
        self.vector = vector

    def travel(self, header: Headers) -> Headers:
        return self.inner.sum(self.vector, header)

    def after(self, vector: Array, bad: Array) -> None:
        first = self.wire.first_bad(vector)
        bad[1] = FINITE if first < 0 else first
