"""The messages between a host and its GPU, emulated or real (`pytest -m gpu`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distconv.kernels.gpu.arithmetic import Gpu
from distconv.kernels.gpu.mailbox import GpuMailbox
from distconv.kernels.interface import FINITE

STEP = 2**33 + 6


def found(box: GpuMailbox) -> tuple[Any, ...]:
    """Step, numbers and samples, as the device has them."""
    return tuple(box.device.download(field).tolist() for field in (box.step, box.numbers, box.samples))


def begin(box: GpuMailbox) -> None:
    box.begin(box.device.zeros(1, np.float32))


@pytest.mark.parametrize("size", [1, 5, 2000])
def test_a_step_begins_without_gradient_and_without_a_bad_number(gpu: Gpu, size: int) -> None:
    box, gradient = gpu.mailbox(1, 1, 1), gpu.device.upload(np.full(size, np.nan, np.float32))
    gpu.device.copy(box.bad, gpu.device.zeros(2, np.int32))
    box.send(0, [0.0], [0])
    box.begin(gradient)
    assert gpu.device.download(gradient).tolist() == [0] * size
    assert gpu.device.download(box.bad).tolist() == [FINITE, FINITE]


@pytest.mark.parametrize("N", [3, 1020, 1021, 5000])  # fewer, as many and more words than are read at once
def test_a_message_arrives_word_by_word(gpu: Gpu, N: int) -> None:
    box, samples = gpu.mailbox(2, N, 1), np.arange(N)[::-1] * 7
    box.send(STEP, [0.5, -2.0], samples)
    begin(box)
    assert found(box) == ([6, 2], [0.5, -2.0], samples.tolist())


def test_a_message_with_fewer_samples_leaves_the_others(gpu: Gpu) -> None:
    box = gpu.mailbox(1, 3, 1)
    box.send(0, [0.5], [4, 5])
    begin(box)
    assert found(box)[2][:2] == [4, 5]


def test_a_message_that_is_sent_ahead_is_the_next_one(gpu: Gpu) -> None:
    box = gpu.mailbox(1, 1, 1)
    box.send(0, [0.0], [0])
    for step in range(1, 6):
        box.taken()
        box.send(step, [step / 2], [10 * step])
        begin(box)
        assert found(box) == ([step - 1, 0], [(step - 1) / 2], [10 * (step - 1)])


def test_recorded_work_takes_each_message_in_its_turn_and_tells_of_it(gpu: Gpu) -> None:
    box, gradient = gpu.mailbox(1, 1, 2), gpu.device.zeros(3, np.float32)
    sums = [gpu.device.upload(np.array([number])) for number in (1 / 3, 1e300)]

    def work() -> None:
        box.begin(gradient)
        box.collect(sums)

    for step in range(STEP, STEP + 6):
        box.send(step, [0.5], [step % 1000])
        gpu.device.replayed("step", work)
        box.taken()
        gpu.device.wait(gpu.device.mark())
        assert list(box.sums(step)) == [1 / 3, 1e300] and box.bad_at(step) == (FINITE, FINITE)
        assert found(box)[0] == [step % 2**32, 2] and found(box)[2] == [step % 1000]


@pytest.mark.parametrize("begun", [True, False])
def test_an_error_between_a_message_and_its_work_does_not_mix_up_those_that_follow(gpu: Gpu, begun: bool) -> None:
    box = gpu.mailbox(1, 1, 1)
    box.send(0, [0.0], [0])
    if begun:
        begin(box)
    for step in range(1, 4):
        box.send(step, [0.5], [step])
        begin(box)
        box.taken()
        assert found(box) == ([step, 0], [0.5], [step])


def test_what_is_told_of_two_steps_can_be_read_in_any_order(gpu: Gpu) -> None:
    box = gpu.mailbox(1, 1, 1)
    for step in (6, 7):
        box.send(step, [0.5], [step])
        begin(box)
        box.taken()
        gpu.device.copy(box.bad, gpu.device.upload(np.array([step, 10 * step], np.int32)))
        box.collect([gpu.device.upload(np.array([step / 3]))])
    gpu.device.synchronize()
    assert box.bad_at(7) == (7, 70) and box.bad_at(6) == (6, 60)
    assert list(box.sums(6)) == [2] and list(box.sums(7)) == [7 / 3]


def test_telling_without_a_sum_leaves_those_that_were_told(gpu: Gpu) -> None:
    box = gpu.mailbox(1, 1, 2)
    box.send(3, [0.5], [0])
    begin(box)
    box.collect([gpu.device.upload(np.array([number])) for number in (1.5, 2.5)])
    gpu.device.copy(box.bad, gpu.device.upload(np.array([5, 6], np.int32)))
    box.collect([])
    gpu.device.synchronize()
    assert list(box.sums(3)) == [1.5, 2.5] and box.bad_at(3) == (5, 6)


def test_the_tellings_of_another_step_are_an_error(gpu: Gpu) -> None:
    box = gpu.mailbox(1, 1, 1)
    box.send(3, [0.5], [0])
    begin(box)
    box.collect([])
    gpu.device.synchronize()
    for read in (box.sums, box.bad_at):
        with pytest.raises(RuntimeError, match="made step 3 and not 5"):
            read(5)


def test_a_sum_of_another_type_is_an_error(gpu: Gpu) -> None:
    box = gpu.mailbox(1, 1, 1)
    for wrong in (gpu.device.zeros(1, np.float32), gpu.device.zeros(2, np.float64), 0.5, np.float64(0.5)):
        with pytest.raises(TypeError, match="must be an array"):
            box.collect([wrong])
