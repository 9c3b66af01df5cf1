"""The messages between a GPU and its host: one small copy each way a step, through memory that the GPU can reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distconv.kernels.interface import FINITE, Array

SLOTS = 2  # a step may begin before the host has read what the one before tells
STEP_BYTES = 8


class GpuMailbox:
    """On the device: step (2,) uint32, lower half first; numbers of the rule, float32; samples int32; bad (2,) int32.

    Work that is recorded once finds in them, each time, what was sent last.
    """

    def __init__(self, device: Any, numbers: int, samples: int, sums: int) -> None:
        self.device, self.numbers_end = device, STEP_BYTES + 4 * numbers
        nbytes = self.numbers_end + 4 * samples
        self.there, self.bad = device.empty(nbytes, np.uint8), device.upload(np.full(SLOTS, FINITE, np.int32))
        self.here, self.sums_here, self.bad_here = (
            [device.pinned(n) for _ in range(SLOTS)] for n in (nbytes, max(8, 8 * sums), 8)
        )
        self.step, self.numbers, self.samples = self._fields(self.there)

    def _fields(self, message: Array) -> tuple[Array, Array, Array]:
        numbers = message[STEP_BYTES : self.numbers_end]
        return (
            message[:STEP_BYTES].view(np.uint32),
            numbers.view(np.float32),
            message[self.numbers_end :].view(np.int32),
        )

    def send(self, step: int, numbers: Sequence[float], samples: Any) -> None:
        """Start to bring these to the device; at most as many samples as there is room for."""
        here = self.here[step % SLOTS]
        of_step, of_rule, indices = self._fields(here)
        of_step[:] = step & 0xFFFFFFFF, step >> 32
        of_rule[:] = numbers
        indices[: len(samples)] = samples
        self.device.copy(self.there, here)

    def collect(self, step: int, sums: Sequence[Any]) -> None:
        """sums: arrays (1,) of float64 of the device."""
        for i, number in enumerate(sums):
            self.device.copy(self.sums_here[step % SLOTS][8 * i : 8 * i + 8], number)
        self.device.copy(self.bad_here[step % SLOTS], self.bad)

    def sums(self, step: int) -> Sequence[float]:
        return [float(number) for number in self.sums_here[step % SLOTS].view(np.float64)]

    def bad_at(self, step: int) -> tuple[int, int]:
        own, total = self.bad_here[step % SLOTS].view(np.int32)
        return int(own), int(total)
