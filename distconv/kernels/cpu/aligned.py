"""Arrays that begin on a cache line.

A vector of AVX-512 fills a line. NumPy's arrays begin anywhere, so that each of their vectors lies in two lines, which
costs a store twice the time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

LINE = 64  # bytes


def empty(*shape: int) -> NDArray[Any]:
    """An array of float32 with anything in it."""
    size = 4 * math.prod(shape)
    room = np.empty(size + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    return room[start : start + size].view(np.float32).reshape(shape)
