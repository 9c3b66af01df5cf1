"""The kernels of the optimizers on a GPU, emulated or real (`pytest -m gpu`), against the CPU's updates."""

from __future__ import annotations

import numpy as np
import pytest

from distconv.kernels.gpu.arithmetic import Gpu
from distconv.kernels.interface import FINITE
from distconv.nn.optimizers import OPTIMIZERS, Optimizer
from tests.gpu import error, normal, random


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(gpu: Gpu, name: str) -> None:
    device, rng, n = gpu.device, random(15), 700
    optimizer: Optimizer = OPTIMIZERS[name](0.1)
    p, state = rng.standard_normal(n), optimizer.new_state(n, np.float64)
    vectors = [device.upload(vector.astype(np.float32)) for vector in (p, *state.values())]
    for t in (1, 2, 3):
        g = normal(rng, n) * (rng.random(n) < 0.9)
        there, numbers = device.upload(g.astype(np.float32)), device.upload(np.float32(optimizer.numbers(t)))
        for bad_sum in (n - 1, FINITE):  # in this order: what is not finite changes nothing
            bad = device.upload(np.int32([FINITE, bad_sum]))
            gpu.update(optimizer, vectors[0], there, vectors[1:], numbers, bad)
        optimizer.step(p, g.astype(np.float64), optimizer.numbers(t), *state.values())
        for found, expected in zip(vectors, (p, *state.values()), strict=True):
            assert error(device.download(found), expected) < 1e-6


def test_what_decays_and_what_is_moved_by_its_layer(gpu: Gpu) -> None:
    device, p, g = gpu.device, np.arange(300, dtype=np.float32), np.ones(300, np.float32)
    there, numbers = device.upload(p), device.upload(np.float32([0.5, 9]))
    for bad_sum in (3, FINITE):
        bad = device.upload(np.int32([FINITE, bad_sum]))
        gpu.decay(there, numbers, bad)
        gpu.add(there, device.upload(g), bad)
    np.testing.assert_array_equal(device.download(there), p / 2 + 1)


def test_the_average_of_the_weights(gpu: Gpu) -> None:
    device, rng = gpu.device, random(16)
    ema, p = normal(rng, 700), normal(rng, 700)
    there, weights = device.upload(ema), device.upload(p)
    for share in (0.9, 0.25):
        for bad_sum in (3, FINITE):  # in this order: what is not finite changes nothing
            bad = device.upload(np.int32([FINITE, bad_sum]))
            gpu.average(there, weights, device.upload(np.float32([9, share]))[1:], bad)
            if bad_sum == FINITE:
                ema = (1 - share) * ema.astype(np.float64) + share * p
            assert error(device.download(there), ema) < 1e-7
    np.testing.assert_array_equal(device.download(weights), p)
