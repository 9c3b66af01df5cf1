"""The sum over the ranks of gradients that lie where the host computes: on_gpu.py has the other ways."""

from __future__ import annotations

from collections.abc import Callable

from distconv.comm.buckets import Buckets
from distconv.comm.exchange import Exchange, Headers
from distconv.kernels.interface import FINITE, Array


class OnCpu:
    """An exchange of the host as a step uses it; see GpuExchange."""

    needs_no_host, bus_bytes = False, 0

    def __init__(self, inner: Exchange) -> None:
        self.inner, self.wire, self.how, self.bytes_sent = inner, inner.wire, inner.how, inner.bytes_sent

    @property
    def waited(self) -> float:
        return self.inner.waited

    def sender(self, vector: Array) -> Callable[[int | None], None] | None:
        inner = self.inner
        if not isinstance(inner, Buckets):
            return None
        return lambda start: None if start is None else inner.ready(vector, start)

    def before(self, vector: Array, bad: Array) -> None:
        self.vector = vector

    def travel(self, header: Headers) -> Headers:
        return self.inner.sum(self.vector, header)

    def after(self, vector: Array, bad: Array) -> None:
        first = self.wire.first_bad(vector)
        bad[1] = FINITE if first < 0 else first
