"""A data set in memory: pixels stay bytes until a step uses them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.errors import BadDataError

Bytes = NDArray[np.uint8]
MOST_CLASSES = 256  # labels are bytes


@dataclass(frozen=True)
class Dataset:
    """Images (N, H, W) or (N, H, W, C) of bytes and labels (N,) in [0, classes), for training and for test.

    classes: 2 to 256, what a byte can tell apart. Raises BadDataError where these do not fit together. Images without
    a channel axis get one of length 1; arrays that are not contiguous are copied.
    """

    name: str
    train_images: Bytes
    train_labels: Bytes
    test_images: Bytes
    test_labels: Bytes
    classes: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", _whole(self.name, self.classes))
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            _check_pair(f"{self.name}, {part}", images, labels, self.classes)
            images = images[..., np.newaxis] if images.ndim == 3 else images
            object.__setattr__(self, f"{part}_images", np.ascontiguousarray(images))
            object.__setattr__(self, f"{part}_labels", np.ascontiguousarray(labels))
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise BadDataError(
                f"{self.name}: training images have shape {self.train_images.shape[1:]} and test images "
                f"{self.test_images.shape[1:]}; they must be alike"
            )

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C)"""
        return self.train_images.shape[1:]

    @cached_property
    def parts(self) -> dict[str, tuple[Bytes, Bytes]]:
        """Images and labels by what they are for."""
        return {"train": (self.train_images, self.train_labels), "test": (self.test_images, self.test_labels)}

    def size(self, part: str) -> int:
        return len(self.parts[part][1]) if part in self.parts else 0

    def batch(self, part: str, samples: Any, context: Any) -> tuple[Any, Any]:
        """x (N, H, W, C) and labels (N,) of some samples of a part, on the device of the context's kernels."""
        kernels = context.kernels
        images, labels = self._placed(kernels, part)
        return kernels.gather(images, samples), kernels.gather_labels(labels, samples)

    def _placed(self, kernels: Any, part: str) -> tuple[Any, Any]:
        """The arrays of a part, brought to a device when they are first used there."""
        key = id(kernels.device), part
        if key not in self._there:
            images, labels = self.parts[part]
            self._there[key] = kernels.device.upload(images), kernels.upload_labels(labels)
        return self._there[key]

    @cached_property
    def _there(self) -> dict[tuple[int, str], tuple[Any, Any]]:
        return {}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over shapes and contents: tells whether two ranks, or a run and its checkpoint, see the same data."""
        sha = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            sha.update(repr(array.shape).encode())
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    def limited(self, count: int) -> Dataset:
        """The same with the first `count` training samples only."""
        return replace(self, train_images=self.train_images[:count], train_labels=self.train_labels[:count])


def _whole(where: str, classes: object) -> int:
    """The number of classes, as Python's int. Raises BadDataError."""
    if not isinstance(classes, int | np.integer) or not 2 <= classes <= MOST_CLASSES:
        raise BadDataError(f"{where}: classes is {classes!r}, but a whole number from 2 to {MOST_CLASSES} was expected")
    return int(classes)


def _check_pair(where: str, images: Bytes, labels: Bytes, classes: int) -> None:
    for what, array, dimensions in (("images", images, (3, 4)), ("labels", labels, (1,))):
        if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):  # nothing here knows of masks
            raise BadDataError(f"{where}: {what} are a {type(array).__name__}, but a NumPy array of uint8 was expected")
        if array.dtype != np.uint8 or array.ndim not in dimensions:
            raise BadDataError(
                f"{where}: {what} are {array.dtype} of shape {array.shape}, but uint8 with "
                f"{' or '.join(map(str, dimensions))} dimensions were expected"
            )
    if len(images) != len(labels):
        raise BadDataError(
            f"{where}: there are {len(images)} images and {len(labels)} labels; there must be one label an image"
        )
    if images.size == 0:
        raise BadDataError(
            f"{where}: there are {len(images)} images of shape {images.shape[1:]}; at least one, with at least one "
            f"pixel, was expected"
        )
    if labels.max() >= classes:
        bad = int(np.argmax(labels >= classes))
        raise BadDataError(f"{where}: label number {bad} is {labels[bad]}; labels must lie in 0 to {classes - 1}")
