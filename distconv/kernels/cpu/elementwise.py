"""What is done number by number, in one pass where NumPy takes two or three; on vectors (n,) of float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from distconv.kernels.compiled import compiled

ZERO = np.float32(0)


@compiled
def add_and_cut(x: Any, other: Any, y: Any) -> None:
    """y = max(x + other, 0); what is not a number stays."""
    for i in range(x.size):
        total = x[i] + other[i]
        y[i] = ZERO if total < 0 else total


@compiled
def behind_relu(dy: Any, y: Any, dx: Any) -> None:
    """dx = dy where y is positive, else 0."""
    for i in range(y.size):
        dx[i] = dy[i] if y[i] > 0 else ZERO
