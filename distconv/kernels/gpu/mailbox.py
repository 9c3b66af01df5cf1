"""The messages between a GPU and its host, in memory of the host that kernels read and write: a step makes no copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distconv.kernels.interface import FINITE, Array

SLOTS = 2  # a step may begin before the host has read what the one before tells
STEP_WORDS = 2
TOLD_WORDS = 3  # bad, and the lower half of the step


class GpuMailbox:
    """On the device: step (2,) uint32, lower half first; numbers of the rule, float32; samples int32; bad (2,) int32.

    Work that is recorded once finds in them, each time, what was sent last. Messages lie in the slots in turn. `turn`
    (1,) int32 of the device is the slot of the next one, and `slot` is the host's count of it. Each message is read by
    one begin(). What is told lies in the slot of the step's number.
    """

    def __init__(self, gpu: Any, numbers: int, samples: int, sums: int) -> None:
        self.gpu, self.device, self.numbers_end = gpu, gpu.device, STEP_WORDS + numbers
        words = self.numbers_end + samples
        self.sent, self.sent_there = self._shared((SLOTS, words), np.uint32)
        self.told, self.told_there = self._shared((SLOTS, TOLD_WORDS), np.int32)
        self.sums_told, self.sums_there = self._shared((SLOTS, max(1, sums)), np.float64)
        self.there, self.bad = self.device.empty(words, np.uint32), self.device.upload(np.full(2, FINITE, np.int32))
        self.turn, self.no_sum = self.device.zeros(1, np.int32), self.device.zeros(1, np.float64)
        self.step, self.numbers, self.samples = self._fields(self.there)
        self.slot, self.is_taken = 0, True

    def _shared(self, shape: tuple[int, int], dtype: Any) -> tuple[Array, Array]:
        """Memory of the host, and the same as kernels take it."""
        here = self.device.pinned(shape[0] * shape[1] * np.dtype(dtype).itemsize).view(dtype).reshape(shape)
        return here, self.device.mapped(here)

    def _fields(self, message: Array) -> tuple[Array, Array, Array]:
        numbers = message[STEP_WORDS : self.numbers_end]
        return message[:STEP_WORDS], numbers.view(np.float32), message[self.numbers_end :].view(np.int32)

    def send(self, step: int, numbers: Sequence[float], samples: Any) -> None:
        """Leave these for the next begin(); at most as many samples as there is room for."""
        if not self.is_taken:  # an error came before taken(), and the begin() of the last message may be missing
            self.device.copy(self.turn, self.device.upload(np.array([self.slot], np.int32)))
        of_step, of_rule, indices = self._fields(self.sent[self.slot])
        of_step[:] = step & 0xFFFFFFFF, step >> 32
        of_rule[:] = numbers
        indices[: len(samples)] = samples
        self.slot, self.is_taken = (self.slot + 1) % SLOTS, False

    def begin(self, gradient: Array) -> None:
        """See Mailbox."""
        arguments = gradient, self.bad, gradient.size, self.sent_there, self.there, self.there.size, self.turn, SLOTS
        self.gpu.launch("layers", "begin_step", max(gradient.size, 2), *arguments)

    def taken(self) -> None:
        """See Mailbox."""
        self.is_taken = True

    def collect(self, sums: Sequence[Any]) -> None:
        """sums: arrays (1,) of float64 of the device. A kernel for each, or one where there is none."""
        for number in sums:
            if not isinstance(number, type(self.no_sum)) or number.dtype != np.float64 or number.size != 1:
                raise TypeError(f"a sum on a GPU must be an array (1,) of float64 of the device, not {number!r}")
        for place, number in list(enumerate(sums)) or [(-1, self.no_sum)]:
            arguments = self.bad, self.step, number, self.told_there, self.sums_there, place
            self.gpu.launch("layers", "report", 1, *arguments, self.sums_there.shape[1], SLOTS)

    def sums(self, step: int) -> Sequence[float]:
        self._check(step)
        return [float(number) for number in self.sums_told[step % SLOTS]]

    def bad_at(self, step: int) -> tuple[int, int]:
        self._check(step)
        own, total, _ = self.told[step % SLOTS]
        return int(own), int(total)

    def _check(self, step: int) -> None:
        """Raises RuntimeError where the device made another step than the host means."""
        made = int(self.told[step % SLOTS, 2]) & 0xFFFFFFFF
        if made != step & 0xFFFFFFFF:
            raise RuntimeError(f"the GPU made step {made} and not {step}; this is a bug")
