"""Classification: softmax cross-entropy, and how many samples get the class of their label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from distconv.errors import BadDataError, UsageError
from distconv.nn.layers import Context, Layer
from distconv.nn.parameters import Views


class Classification:
    """The model gives a score for each class (N, classes); labels (N,) say which should be largest.

    label_smoothing: see kernels/cpu/arithmetic.py; the scores of an epoch do not know of it.
    """

    sums: ClassVar[Sequence[str]] = ("loss",)
    metric: ClassVar[str] = "accuracy"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def output_shape(self, data: Any) -> tuple[int, ...] | None:
        """See Task."""
        if shape := getattr(data, "label_shape", ()):
            raise UsageError(
                f"labels have shape {shape} for each image, but classify takes one class an image: turn one-hot labels "
                f"into classes by labels.argmax(1), or name a task of your own by --task"
            )
        return (data.classes,)

    def blind_loss(self, data: Any) -> float:
        return math.log(data.classes)

    def gradient(self, model: Layer, values: Views, grads: Views, batch: Any, context: Context) -> Sequence[Any]:
        """See Task."""
        x, labels = batch
        scores, backward = model.forward(x, values, context)
        if context.kernels.name == "cpu":  # compiled code trusts labels, and those of a user's own Data may be any
            _check_labels(labels, *scores.shape)
        loss, dscores = context.kernels.softmax_cross_entropy(
            scores, labels, context.global_batch, self.label_smoothing
        )
        backward(dscores, grads, False)
        return (loss,)

    def evaluate(self, model: Layer, values: Views, batch: Any, context: Context) -> tuple[float, float]:
        """See Task: the correct ones, and all."""
        x, labels = batch
        correct = np.count_nonzero(predict(model, values, x, context) == context.kernels.device.download(labels))
        return float(correct), float(len(x))


def _check_labels(labels: Any, count: int, classes: int) -> None:
    if labels.shape != (count,) or labels.min() < 0 or labels.max() >= classes:
        raise BadDataError(
            f"labels of shape {labels.shape} from {labels.min()} to {labels.max()} came with {count} images, but one "
            f"for each from 0 to {classes - 1} was expected"
        )


def predict(model: Layer, values: Views, x: Any, context: Context) -> Any:
    """The class of each sample of x (N, ...) -> (N,) int64, on the host."""
    scores, _ = model.forward(x, values, context)
    return context.kernels.argmax(scores)
