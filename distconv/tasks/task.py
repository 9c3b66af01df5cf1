"""What a step learns and what an epoch reports: a task. classify.py is the usual one, others are the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from distconv.nn.layers import Context, Layer
from distconv.nn.parameters import Views


class Task(Protocol):
    """What is learned from a batch.

    sums: names of what `gradient` returns, the loss first; a step's record has their means over the global batch.
    metric: the name of what `evaluate` measures; an epoch's record has it as train_accuracy, test_accuracy and so on.
    """

    sums: ClassVar[Sequence[str]]
    metric: ClassVar[str]

    def output_shape(self, data: Any) -> tuple[int, ...] | None:
        """What a model must give for a sample, without the batch axis; None: anything.

        Raises UsageError for data that this task cannot learn from.
        """
        ...

    def blind_loss(self, data: Any) -> float:
        """What a model that knows nothing loses: far above it, a run has diverged; infinity: however large it is."""
        ...

    def gradient(self, model: Layer, values: Views, grads: Views, batch: Any, context: Context) -> Sequence[Any]:
        """Add to grads what this rank's samples have in the gradient of the mean loss over the global batch.

        batch: what Data.batch gave, at least one sample. Returns a sum over the samples for each name: numbers, or
        arrays (1,) of float64 of the device. A task never talks to other ranks.
        """
        ...

    def evaluate(self, model: Layer, values: Views, batch: Any, context: Context) -> tuple[float, float]:
        """Two sums over the samples: the metric is the first, over all batches and ranks, divided by the second."""
        ...
