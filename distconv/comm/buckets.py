"""Overlap: a large gradient travels in pieces while the backward pass computes the rest of it.

The last layers' gradients are final first. As soon as a bucket is, a thread exchanges it; the step ends when all have
arrived, so no gradient is ever stale. Buckets lie at fixed places of the vector, so what is ready when changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from distconv.comm.exchange import HEADER, Exchange, Headers, Refusal
from distconv.kernels.interface import Array

BUCKET = 1 << 20  # numbers: 2 MiB of halves, 0.3 s at 100 Mbit/s, so that latencies do not count
LEAST = 2 * BUCKET  # numbers of a gradient that is worth it


def places(size: int) -> list[slice]:
    """Where the buckets of a vector (size,) lie in it."""
    return [slice(start, min(start + BUCKET, size)) for start in range(0, size, BUCKET)]


class Buckets:
    """An exchange made of one for each bucket. connect(size, place) makes such a one, with that header; collective."""

    carrier = "buckets"

    def __init__(self, size: int, connect: Callable[[int, int], Exchange], header: np.dtype[Any] = HEADER) -> None:
        self.header = header
        self.places = places(size)
        self.exchanges = [connect(place.stop - place.start, place.start) for place in self.places]
        self.wire = self.exchanges[0].wire
        self.how = f"{len(self.places)} buckets behind the backward pass, {self.exchanges[0].how}"
        self.bytes_sent = sum(exchange.bytes_sent for exchange in self.exchanges)
        self.buffer_bytes = sum(exchange.buffer_bytes for exchange in self.exchanges)
        self.thread = ThreadPoolExecutor(1)
        self.sent: list[Future[Headers]] = []  # from the last bucket down

    @property
    def waited(self) -> float:
        return sum(exchange.waited for exchange in self.exchanges)

    def close(self) -> None:
        self.thread.shutdown()
        for exchange in self.exchanges:
            exchange.close()

    def ready(self, vector: Array, start: int, step: int) -> None:
        """Begin to exchange the buckets of vector (size,) that lie from `start` on, where it is final."""
        header = np.zeros((), self.header)
        header["step"] = step  # as in the header of sum, or the bits would depend on what was ready when
        while len(self.sent) < len(self.places) - 1 and self.places[-1 - len(self.sent)].start >= start:
            self._send(vector, header)

    def sum(self, vector: Array, header: Headers, refused: Refusal | None = None) -> Headers:
        """See Exchange. Sends what is not on its way yet; the header goes with the first numbers, which go last.

        So where it is refused, the numbers of the other buckets have changed, unlike in other exchanges.
        """
        while len(self.sent) < len(self.places):
            self._send(vector, header, refused)
        bucket_headers = [future.result() for future in self.sent]
        self.sent = []
        headers = bucket_headers[-1]
        for place, bucket in zip(self.places[1:], bucket_headers[-2::-1], strict=True):
            first = (headers["bad_at"] < 0) & (bucket["bad_at"] >= 0)
            headers["bad_at"][first] = bucket["bad_at"][first] + place.start
        return headers

    def _send(self, vector: Array, header: Headers, refused: Refusal | None = None) -> None:
        number = len(self.places) - 1 - len(self.sent)
        where = self.places[number]
        self.sent.append(self.thread.submit(self.exchanges[number].sum, vector[where], header, refused))
