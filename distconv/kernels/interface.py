"""What the arithmetic of both devices shares."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]  # or an array of a GPU, which has the same attributes


def output_size(size: int, window: int, stride: int, pad: int) -> int:
    """Length of an axis after windows of `window` elements, `stride` apart, over `size` elements padded by `pad`."""
    return (size + 2 * pad - window) // stride + 1
