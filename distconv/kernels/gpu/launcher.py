"""How a function of a GPU starts its kernel: the source of it, the threads, and arguments as kernels take them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distconv.kernels.gpu.device import Array

THREADS = 256  # of a block, where nothing else is said
MOST = 2**31 - 1  # numbers of an array, as the kernels count in 32 bits


@functools.cache
def source(name: str) -> str:
    """A CUDA file of this package, with what it needs before it."""
    of_products = ("memory", "factors", "sums")
    before = {"normalization": ("memory",), **dict.fromkeys(("convolution", "direct", "direct_filters"), of_products)}
    files = ("instructions", *before.get(name, ()), name)
    return "".join((Path(__file__).parent / "source" / f"{file}.cu").read_text() for file in files)


class Launcher:
    """Starts kernels on a device (a Cuda of device.py)."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def launch(self, file: str, name: str, count: int, *arguments: Any) -> None:
        """Start a kernel with a thread for each of `count` numbers; Python's integers and floats become 32 bits.

        An array of which a layer of a user's own has made a view that is not contiguous is copied.
        """
        check_count(name, count)
        if count > 0:
            kernel = self.device.function(source(file), name)
            kernel((-(-count // THREADS), 1, 1), THREADS, *map(self._argument, arguments))

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, int):
            return np.int32(argument)
        if isinstance(argument, float):
            return np.float32(argument)
        return argument if isinstance(argument, np.generic) else self.device.contiguous(argument)

    def _like(self, x: Array, write: Callable[[Array], None]) -> Array:
        """A new array of the shape of x, written by `write`."""
        y = self.device.empty(x.shape, np.float32)
        write(y)
        return y


def check_count(name: str, count: int) -> None:
    """Raise ValueError for more numbers than a kernel can count."""
    if count > MOST:
        raise ValueError(f"{name}: {count:,} numbers are more than a kernel can count: use a smaller batch")
