"""The loss in one pass over the scores: for ten classes, the ten calls of NumPy take longer than the arithmetic."""

from __future__ import annotations

import math
from typing import Any

from distconv.kernels.compiled import compiled


@compiled
def softmax_cross_entropy(scores: Any, labels: Any, batch: Any, dscores: Any) -> float:
    """The sum over the rows of scores (N, F) of -log softmax(scores)[label], in float64; see kernels/cpu/arithmetic.py.

    Writes the gradient divided by `batch`, a number of the same dtype, into dscores (N, F).
    """
    loss = 0.0
    for n in range(scores.shape[0]):
        row, gradient = scores[n], dscores[n]
        largest = row[0]
        for f in range(1, row.size):
            largest = max(largest, row[f])
        total = row[0] - row[0]
        for f in range(row.size):
            gradient[f] = math.exp(row[f] - largest)
            total += gradient[f]
        for f in range(row.size):
            gradient[f] = (gradient[f] / total - (f == labels[n])) / batch
        loss += math.log(total) - (row[labels[n]] - largest)
    return loss
