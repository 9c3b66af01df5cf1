"""The built-in data set: 1,797 handwritten digits, real ones, small enough to travel with the package.

They are the test part of "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository 1998, https://doi.org/10.24432/C50P49, CC BY 4.0: 8 x 8 pixels of 0 to 16. Here they are enlarged to the size
of MNIST's images and divided, in an order drawn once, into 1,437 for training and 360 for test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distconv.data import idx
from distconv.data.dataset import Bytes, Dataset
from distconv.kernels import philox

TEST_SAMPLES = 360
SIDE = 28  # of an MNIST image
BRIGHTEST = 16


def load() -> Dataset:
    """The digits as 28 x 28 images of bytes."""
    folder = Path(__file__).parent
    images = _enlarge(idx.read(folder / "optdigits-images-idx3-ubyte.gz", 3))
    labels = idx.read(folder / "optdigits-labels-idx1-ubyte.gz", 1)
    order = philox.permutation((0, 0), len(labels))
    test, train = order[:TEST_SAMPLES], order[TEST_SAMPLES:]
    return Dataset("digits", images[train], labels[train], images[test], labels[test])


def _enlarge(images: Bytes) -> Bytes:
    """Bilinear interpolation of (N, 8, 8) between pixel centres -> (N, 28, 28), brightness 0 to 255.

    In whole numbers, as many pixels lie exactly between two bytes: the same images on every machine.
    """
    n = images.shape[1]
    unit = 2 * SIDE  # of an old pixel, in which the centres of new ones are whole numbers
    centres = np.clip((2 * np.arange(SIDE) + 1) * n - SIDE, 0, unit * (n - 1))
    weights = np.maximum(0, unit - np.abs(centres[:, None] - unit * np.arange(n)))  # (28, 8): each row sums to unit
    large = weights @ images.astype(np.int64) @ weights.T * 255
    whole = unit * unit * BRIGHTEST
    result: Bytes = ((2 * large + whole) // (2 * whole)).astype(np.uint8)  # to nearest, halves up
    return result
