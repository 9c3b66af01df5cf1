"""What the tests of a GPU's kernels share: devices to run them on, numbers to give them, and ways to compare."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from distconv.kernels.gpu.device import Cuda, visible
from tests import emulator

Array = NDArray[Any]


class PoisonedCuda(Cuda):
    """A GPU where, as on the emulator, new arrays are full of NaN: what a kernel forgets to write shows."""

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Any:
        array = super().empty(shape, dtype)
        array.reshape(-1).view(np.uint8).fill(0xFF)
        return array


DEVICES = [
    pytest.param(
        "emulated", marks=pytest.mark.skipif(not emulator.available(), reason="kernels are emulated with g++ on Linux")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def new_device(kind: str) -> Any:
    """One of DEVICES; skips the test where there is no such GPU."""
    if kind == "emulated":
        return emulator.Emulator()
    try:
        visible()
    except RuntimeError as error:
        pytest.skip(str(error))
    return PoisonedCuda(0, print)


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def whole(rng: np.random.Generator, *shape: int) -> Array:
    """Small whole numbers, so many of them equal that windows of a pooling have ties.

    They are multiplied and added up without rounding in every precision and order, so most results must be equal to
    the last bit.
    """
    return rng.integers(-3, 4, shape).astype(np.float32)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def bits(x: Array) -> Array:
    """Of float32, where one NaN is as good as another."""
    return np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32)


def error(found: Array, exact: Array) -> float:
    """Relative to the norm."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
