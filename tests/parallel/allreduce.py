"""What the tests of distconv.Allreduce share: what each rank gives, and whether an Allreduce still works."""

from __future__ import annotations

from typing import Any

import numpy as np

import distconv
from distconv.comm.world import World

SIZE = 1000
SHAPES = ((3, 100), (), (7, 9, 11), (0,), (6,))  # SIZE numbers together


def contribution(rank: int, size: int = SIZE, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng([size, rank]).standard_normal(size).astype(dtype)


def arrays(vector: np.ndarray) -> list[np.ndarray]:
    """Copies of a vector's parts, every second one in Fortran's order."""
    cuts = np.cumsum([int(np.prod(shape)) for shape in SHAPES])[:-1]
    parts = [part.reshape(shape) for part, shape in zip(np.split(vector, cuts), SHAPES, strict=True)]
    return [np.array(part, order="CF"[number % 2]) for number, part in enumerate(parts)]


def assert_works(allreduce: distconv.Allreduce, world: World) -> None:
    vector = allreduce.sum(np.full(allreduce.size, world.rank + 1, allreduce.wire.dtype))
    np.testing.assert_array_equal(vector, world.size * (world.size + 1) / 2)
