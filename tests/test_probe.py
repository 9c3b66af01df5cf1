"""What a run says of its wire: of all numbers where they are few, of a sample where they are many."""

from __future__ import annotations

import time

import numpy as np
import pytest

from distconv.comm.probe import SAMPLE, WireProbe
from distconv.comm.wire import WIRES
from distconv.kernels.interface import BLOCK
from tests.files import peak_memory


class Doubling:
    """An exchange between two ranks that hold the same, which takes as long as it is told."""

    carrier, how, bytes_sent, waited, wire = "doubling", "", 0, 0.0, WIRES["float32"]

    def __init__(self, size: int, seconds: float = 0.0) -> None:
        self.size, self.seconds = size, seconds

    def sum(self, vector: np.ndarray, header: np.ndarray) -> np.ndarray:
        assert vector.size == self.size
        time.sleep(self.seconds)
        vector *= 2
        return header


def through(wire: str, x: np.ndarray) -> np.ndarray:
    return WIRES[wire].round_trip(x)


def compared(gradient: np.ndarray, wire: str = "float16") -> WireProbe:
    probe = WireProbe(WIRES[wire], gradient.size, Doubling)
    probe.compare(probe.sample(gradient), through(wire, 2 * gradient))
    return probe


@pytest.mark.parametrize("size", [1, 777, SAMPLE])
def test_of_a_small_gradient_every_number_counts(size: int) -> None:
    gradient = np.random.default_rng(0).standard_normal(size).astype(np.float32) * 1e-3
    gradient[size // 2] = 5  # in its block, what is 2^39 times smaller vanishes
    gradient[: size // 2] = 1e-20
    total = through("float16", 2 * gradient)
    health = compared(gradient).health
    assert health.largest_gradient == np.abs(total).max()
    assert health.flushed_share == np.count_nonzero(through("float16", gradient) == 0) / size
    wanted = np.divide(*(np.linalg.norm(x.astype(np.float64)) for x in (total - 2 * gradient, 2 * gradient)))
    assert health.wire_error == pytest.approx(wanted, rel=1e-5)
    beside_zeros = compared(np.concatenate([gradient, np.zeros(3 * size, np.float32)])[:SAMPLE]).health
    assert beside_zeros.flushed_share == health.flushed_share  # of the numbers that are not 0


def test_of_a_large_gradient_a_sample_says_nearly_the_same_and_the_largest_number_is_found_anywhere() -> None:
    random = np.random.default_rng(0)
    gradient = random.standard_normal(3 * SAMPLE + 7).astype(np.float32)
    gradient[random.random(gradient.size) < 0.01] = 1e-20  # vanishes
    gradient[-1] = -1000  # in the last block, which is not whole
    total = through("float16", 2 * gradient)
    health = compared(gradient).health
    assert health.largest_gradient == np.abs(total).max() == 2000
    assert health.flushed_share == pytest.approx(0.01, rel=0.1)
    assert 1e-5 < health.wire_error < 2**-11


def test_a_sample_is_of_whole_blocks_from_all_parts_of_the_gradient() -> None:
    gradient = np.arange(5 * SAMPLE + 7, dtype=np.float64)
    sample = WireProbe(WIRES["float64"], gradient.size, Doubling).sample(gradient)
    blocks = sample.reshape(-1, BLOCK)
    assert sample.size == SAMPLE and not np.any(blocks[:, 0] % BLOCK) and np.all(np.diff(blocks) == 1)
    assert len(set(blocks[:, 0])) == len(blocks)
    starts = [0.0, *blocks[:, 0], float(gradient.size)]
    assert np.diff(starts).max() <= 7 * BLOCK  # no part is left out


def test_the_seconds_of_a_sample_are_those_of_all_numbers() -> None:
    probe = WireProbe(WIRES["float16"], 5 * SAMPLE, lambda size: Doubling(size, 0.01))
    probe.time()
    assert probe.seconds >= 0.05


def test_a_number_that_is_not_finite_is_the_largest() -> None:
    gradient = np.ones(9, np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        gradient[4] = bad
        assert compared(gradient).health.largest_gradient == pytest.approx(abs(bad), nan_ok=True)


def test_a_large_gradient_takes_no_more_memory_than_a_few_samples() -> None:
    gradient = np.ones(20 * SAMPLE, np.float32)
    compared(gradient[:9])  # compiles
    probe = WireProbe(WIRES["float16"], gradient.size, Doubling)
    assert peak_memory(lambda: probe.compare(probe.sample(gradient), gradient)) < gradient.nbytes / 3
