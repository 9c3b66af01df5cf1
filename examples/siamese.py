"""A weight used twice: one network looks at two images, and a loss of its own pulls the same digits together.

Both images go through the same layers with the same weights. A backward pass adds to the gradients, so that the two
passes need not know of each other.

    mpirun -n 2 python -m distconv.train --data examples.siamese:data --model examples.siamese:model \
        --task examples.siamese:task --epochs 10 --batch-size 50
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from distconv.data import digits
from distconv.data.dataset import Dataset
from distconv.nn.layers import Affine, Chain, Conv, MaxPool

MARGIN = 1.0  # different digits need not be further apart than this


def data():
    """Pairs of the built-in digits as images of two channels; label 1: they are the same digit, as half of them are."""
    whole, random = digits.load(), np.random.default_rng(0)

    def pairs(images, labels):
        first = random.permutation(np.repeat(np.arange(len(labels)), 4))
        second = np.array(
            [random.choice(np.flatnonzero((labels == labels[i]) == (n % 2))) for n, i in enumerate(first)]
        )
        return np.concatenate([images[first], images[second]], axis=-1), (labels[first] == labels[second])

    parts = *pairs(whole.train_images, whole.train_labels), *pairs(whole.test_images, whole.test_labels)
    return Dataset("pairs of digits", *parts, classes=2)


@dataclass(frozen=True)
class Twice:
    """An inner layer, applied to each of the two channels of a pair: (H, W, 2) -> (2, *what it gives)."""

    inner: Any

    def shapes(self, input_shape):
        height, width, _ = input_shape
        shape, specs = self.inner.shapes((height, width, 1))
        return (2, *shape), {"inner": specs}

    def forward(self, x, params, context):
        inside = context.within("inner")
        (a, backward_a), (b, backward_b) = (
            self.inner.forward(np.ascontiguousarray(x[..., i : i + 1]), params["inner"], inside) for i in (0, 1)
        )

        def backward(dy, grads, wants_dx):
            parts = backward_a(dy[:, 0], grads["inner"], wants_dx), backward_b(dy[:, 1], grads["inner"], wants_dx)
            return np.concatenate(parts, axis=-1) if wants_dx else None

        return np.stack([a, b], axis=1), backward


def model(classes):
    return Twice(Chain(Conv(16, pad=1, relu=True), MaxPool(), Conv(16, pad=1, relu=True), MaxPool(), Affine(8)))


class Contrastive:
    """d d for a pair of the same, max(0, MARGIN - d)^2 for others, d their distance (Hadsell et al. 2006)."""

    sums, metric = ("loss",), "accuracy"

    def output_shape(self, data):
        return None

    def blind_loss(self, data):
        return MARGIN**2

    def gradient(self, model, values, grads, batch, context):
        x, same = batch
        points, backward = model.forward(x, values, context)
        apart = points[:, 0] - points[:, 1]
        distance = np.sqrt((apart**2).sum(axis=1) + 1e-12)
        short = np.maximum(0, MARGIN - distance)  # of the margin
        slope = np.where(same, 2, -2 * short / distance)[:, np.newaxis] * apart / context.global_batch
        backward(np.stack([slope, -slope], axis=1).astype(x.dtype), grads, False)
        return (np.where(same, distance**2, short**2).sum(dtype=np.float64),)

    def evaluate(self, model, values, batch, context):
        x, same = batch
        points, _ = model.forward(x, values, context)
        near = ((points[:, 0] - points[:, 1]) ** 2).sum(axis=1) < (MARGIN / 2) ** 2
        return np.count_nonzero(near == same), len(x)


task = Contrastive
