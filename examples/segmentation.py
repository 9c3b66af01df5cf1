"""Per-pixel labels with a loss and a metric of their own: which pixels of a cluttered image belong to the digit?

The labels of an image are an image themselves, so this needs a task of its own: the loss is a logistic one for each
pixel, the metric the intersection over union of the pixels that are found and those that should be.

    mpirun -n 2 python -m distconv.train --data examples.segmentation:data --model examples.segmentation:model \
        --task examples.segmentation:task --epochs 3 --batch-size 32
"""

from __future__ import annotations

import numpy as np

from distconv.data import digits
from distconv.data.dataset import Dataset
from distconv.nn.layers import Chain, Conv

INK = 100  # a pixel of at least this brightness belongs to the digit


def data():
    """The built-in digits, half as bright, on noise with two bright bars -> labels (N, 28, 28) of 0 and 1."""
    whole, random = digits.load(), np.random.default_rng(0)

    def cluttered(images):
        clutter = random.integers(0, 100, images.shape)
        for image in clutter:
            image[random.integers(0, 28, 2)] = 200
        return np.maximum(clutter, images // 2).astype(np.uint8), (images[..., 0] >= INK).astype(np.uint8)

    parts = *cluttered(whole.train_images), *cluttered(whole.test_images)
    return Dataset("cluttered digits", *parts, classes=2)


def model(classes):
    """Convolutions that keep the size of an image, the last one with a score for each pixel."""
    return Chain(Conv(16, pad=1, relu=True), Conv(16, pad=1, relu=True), Conv(16, pad=1, relu=True), Conv(1, size=1))


class Segmentation:
    """A score for each pixel, (N, H, W, 1): above 0 where it is in the foreground, whose label (N, H, W) is 1."""

    sums, metric = ("loss",), "iou"

    def output_shape(self, data):
        return (*data.label_shape, 1)

    def blind_loss(self, data):
        return np.log(2)

    def gradient(self, model, values, grads, batch, context):
        x, labels = batch
        scores, backward = model.forward(x, values, context)
        wanted = labels[..., np.newaxis].astype(scores.dtype)
        losses = np.maximum(scores, 0) - scores * wanted + np.log1p(np.exp(-np.abs(scores)))
        pixels = wanted[0].size  # the loss of an image is the mean over its pixels, that of a batch over its images
        dscores = (1 / (1 + np.exp(-scores)) - wanted) / (pixels * context.global_batch)
        backward(dscores, grads, False)
        return (losses.sum(dtype=np.float64) / pixels,)

    def evaluate(self, model, values, batch, context):
        x, labels = batch
        scores, _ = model.forward(x, values, context)
        found, wanted = scores[..., 0] > 0, labels > 0
        return np.count_nonzero(found & wanted), np.count_nonzero(found | wanted)


task = Segmentation
