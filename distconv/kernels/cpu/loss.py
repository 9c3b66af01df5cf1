"""The loss in one pass over the scores: for ten classes, the ten calls of NumPy take longer than the arithmetic."""

from __future__ import annotations

import math
from typing import Any

from distconv.kernels.compiled import compiled


@compiled
def softmax_cross_entropy(scores: Any, labels: Any, batch: Any, smoothing: Any, dscores: Any) -> float:
    """The sum over the rows of scores (N, F) of the loss, in float64; see kernels/cpu/arithmetic.py.

    Writes the gradient divided by `batch` into dscores (N, F); batch and smoothing are numbers of the same dtype.
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
        if smoothing > 0:
            share = smoothing / row.size
            rest = row[0] - row[0]
            for f in range(row.size):
                gradient[f] += (smoothing * (f == labels[n]) - share) / batch
                rest += row[labels[n]] - row[f]
            loss += share * rest
    return loss
