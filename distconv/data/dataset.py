"""A data set in memory: what was given as bytes stays bytes until a step uses it."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.errors import BadDataError, UsageError
from distconv.kernels import philox

Bytes = NDArray[np.uint8]
Images = NDArray[Any]  # (N, H, W, C), uint8 or float32
Labels = NDArray[Any]  # (N, ...), one of LABEL_TYPES

LABEL_TYPES = {1: np.uint8, 2: np.uint16, 4: np.int32, 8: np.int64}  # by size; few, as kernels are compiled for each
MOST_CLASSES = 2**31 - 1
HELD_OUT = (0, 0x5A11DA7E)  # the key of the order from whose end the validation set is taken
CHECKED_AT_ONCE = 1024  # images; to check all of them at once would take a quarter of their memory
PIXELS_AT_ONCE = 1 << 18  # of which means and deviations are computed


@dataclass(frozen=True)
class Dataset:
    """Images and labels in [0, classes), for training and for test, and for validation where there is such a set.

    Images are (N, H, W) or (N, H, W, C), of bytes, which the model is given as 0 to 1, or of finite float32, which it
    is given as they are. Labels are integers or booleans of any width, (N,) for classification, (N, ...) for a task of
    its own. classes: 2 to 2^31 - 1; class_names: one for each, or None. Raises BadDataError where these do not fit
    together.

    Images without a channel axis get one of length 1. Labels are held as uint8, uint16, int32 or int64, the widest of
    those given. Arrays that are contiguous and native are not copied.
    """

    name: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: int = 10
    validation_images: Images | None = None
    validation_labels: Labels | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", _whole(self.name, self.classes))
        if self.class_names is not None:
            object.__setattr__(self, "class_names", _checked_names(self.name, self.class_names, self.classes))
        parts = {part: _checked_pair(f"{self.name}, {part}", *self._pair(part), self.classes) for part in self._parts()}
        _check_alike(self.name, parts)
        widest = max((labels.dtype for _, labels in parts.values()), key=lambda dtype: dtype.itemsize)
        for part, (images, labels) in parts.items():
            object.__setattr__(self, f"{part}_images", images)
            object.__setattr__(self, f"{part}_labels", labels.astype(widest, copy=False))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C)"""
        return self.train_images.shape[1:]

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Of the labels of one image: () for classification."""
        return self.train_labels.shape[1:]

    def size(self, part: str) -> int:
        """How many samples are in train, validation or test; 0 where there is no such part."""
        return len(self._pair(part)[1]) if part in self._parts() else 0

    def batch(self, part: str, samples: Any, context: Any) -> tuple[Any, Any]:
        """x (N, H, W, C) and labels (N, ...) of some samples of a part, on the device of the context's kernels."""
        kernels = context.kernels
        if (kernels.device, part) not in self._there:  # they are brought to a device when they are first used there
            images, labels = self._pair(part)
            self._there[kernels.device, part] = kernels.device.upload(images), kernels.upload_labels(labels)
        images, labels = self._there[kernels.device, part]
        chosen: tuple[Any, Any] = kernels.gather(images, labels, samples)
        return chosen

    @cached_property
    def _there(self) -> dict[tuple[Any, str], tuple[Any, Any]]:
        return {}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over shapes and contents: tells whether two ranks, or a run and its checkpoint, see the same data."""
        sha = hashlib.sha256()
        for part in self._parts():
            for array in self._pair(part):
                sha.update(repr(array.shape).encode())  # types that can be held differ in size
                sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    @cached_property
    def channel_means(self) -> NDArray[np.float64]:
        """(C,): of the training images, as the model is given them: bytes as 0 to 1. Of bytes, rounded once."""
        return self._channel_moments[0]

    @cached_property
    def channel_deviations(self) -> NDArray[np.float64]:
        """(C,): their standard deviations (of the population); 1 instead of 0, as one divides by them."""
        return self._channel_moments[1]

    @cached_property
    def _channel_moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        images = self.train_images
        moments = _moments_of_bytes if images.dtype == np.uint8 else _moments_of_floats
        means, deviations = np.array([moments(images, channel) for channel in range(images.shape[-1])]).T
        return means, np.where(deviations == 0, 1.0, deviations)

    def limited(self, count: int) -> Dataset:
        """The same with the first `count` training samples only. Raises UsageError where that leaves none."""
        if count < 1:
            raise UsageError(f"{self.name}: {count} training samples were asked for; at least one was expected")
        return self._with(train_images=self.train_images[:count], train_labels=self.train_labels[:count])

    def split_validation(self, count: int) -> Dataset:
        """The same with `count` of the training samples held out of training, as the validation set.

        They are the last ones of an order drawn from the number of training samples alone, so that every rank, every
        run and every seed holds out the same, and a smaller set is a part of a larger one. The others keep their order.
        Raises UsageError where there is a validation set already, or no sample would be left to train.
        """
        N = len(self.train_labels)
        if self.validation_labels is not None:
            raise UsageError(
                f"{self.name} has a validation set of its own, {len(self.validation_labels)} samples: hold out none "
                "besides (leave out --validation)"
            )
        if not 1 <= count < N:
            possible = f"1 to {N - 1} can" if N > 1 else "one must be left"
            raise UsageError(f"{self.name}: {count} of {N} training samples cannot be held out: {possible}")
        order = philox.permutation(HELD_OUT, N)
        kept, held = np.sort(order[:-count]), order[-count:]
        return self._with(
            train_images=self.train_images[kept],
            train_labels=self.train_labels[kept],
            validation_images=self.train_images[held],
            validation_labels=self.train_labels[held],
        )

    def _parts(self) -> tuple[str, ...]:
        has_validation = self.validation_images is not None or self.validation_labels is not None
        return ("train", "test", "validation") if has_validation else ("train", "test")

    def _pair(self, part: str) -> tuple[Images, Labels]:
        return getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")

    def _with(self, **parts: NDArray[Any]) -> Dataset:
        """The same with other arrays, which are parts of those that have been checked."""
        other = copy.copy(self)
        for name in list(other.__dict__):
            if isinstance(getattr(type(self), name, None), cached_property):
                del other.__dict__[name]
        other.__dict__.update(parts)
        return other


def _whole(where: str, classes: object) -> int:
    """The number of classes, as Python's int. Raises BadDataError."""
    if not isinstance(classes, int | np.integer) or not 2 <= classes <= MOST_CLASSES:
        raise BadDataError(f"{where}: classes is {classes!r}, but a whole number from 2 to {MOST_CLASSES} was expected")
    return int(classes)


def _checked_names(where: str, names: object, classes: int) -> tuple[str, ...]:
    """The names of the classes. Raises BadDataError where they are not so many, or a terminal cannot show them."""
    if not isinstance(names, list | tuple) or len(names) != classes:
        given = f"{len(names)} names" if isinstance(names, list | tuple) else f"a {type(names).__name__}"
        raise BadDataError(f"{where}: class_names is {given}, but a tuple of {classes} was expected, one for each")
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise BadDataError(f"{where}: the name of class {number} is {name!r:.100}, but printable text was expected")
    return tuple(map(str, names))  # NumPy's texts, too


def _checked_pair(where: str, images: Images, labels: Labels, classes: int) -> tuple[Images, Labels]:
    """The images (N, H, W, C) and the labels (N, ...) of a part, contiguous. Raises BadDataError."""
    images, labels = _native(f"{where}: images", images), _native(f"{where}: labels", labels)
    if images.dtype not in (np.uint8, np.float32) or images.ndim not in (3, 4):
        advice = ": convert them by .astype(np.float32)" if images.dtype.kind == "f" else ""
        raise BadDataError(
            f"{where}: images are {images.dtype} of shape {images.shape}, but uint8 or float32 with 3 or 4 dimensions "
            f"were expected{advice}"
        )
    if labels.dtype.kind not in "uib" or labels.ndim < 1:
        advice = "convert them by .astype(np.int64)"
        if labels.dtype.kind in "USO":  # names of classes, which that cannot convert
            advice = "number the classes from 0, in all parts alike, and give their names as class_names"
        raise BadDataError(
            f"{where}: labels are {labels.dtype} of shape {labels.shape}, but integers, one or more an image, were "
            f"expected: {advice}"
        )
    if len(images) != len(labels):
        raise BadDataError(
            f"{where}: there are {len(images)} images and {len(labels)} labels; there must be one label an image"
        )
    for what, array, element in (("images", images, "pixel"), ("labels", labels, "number")):
        if array.size == 0:
            raise BadDataError(
                f"{where}: there are {len(images)} {what} of shape {array.shape[1:]}; at least one, with at least one "
                f"{element}, was expected"
            )
    _check_finite(where, images)
    _check_range(where, labels, classes)
    images = images[..., np.newaxis] if images.ndim == 3 else images
    return images, labels.view(LABEL_TYPES[labels.dtype.itemsize])  # in range, so the bits mean the same


def _native(what: str, array: object) -> NDArray[Any]:
    """The array, contiguous and in this machine's order of bytes. Raises BadDataError for anything else."""
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):  # nothing here knows of masks
        raise BadDataError(f"{what} are a {type(array).__name__}, but a NumPy array was expected")
    if array.ndim == 0:
        return array  # NumPy would give it a dimension
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _check_finite(where: str, images: Images) -> None:
    """Raise BadDataError where a number is NaN or infinite; says which is the first."""
    if images.dtype == np.uint8:
        return
    for start in range(0, len(images), CHECKED_AT_ONCE):
        finite = np.isfinite(images[start : start + CHECKED_AT_ONCE])
        if not finite.all():
            first, *pixel = np.unravel_index(int(np.argmin(finite)), finite.shape)
            value, place = images[(start + first, *pixel)], tuple(map(int, pixel))
            raise BadDataError(f"{where}: image number {start + first} holds {value} at {place}; pixels must be finite")


def _check_range(where: str, labels: Labels, classes: int) -> None:
    """Raise BadDataError where a label is none of the classes; says which is the first."""
    if labels.min() >= 0 and labels.max() < classes:
        return
    first = int(np.argmax((labels < 0) | (labels >= classes)))
    number, *rest = map(int, np.unravel_index(first, labels.shape))
    place = f" at {tuple(rest)}" if rest else ""
    raise BadDataError(
        f"{where}: label number {number}{place} is {labels.reshape(-1)[first]}; labels must lie in 0 to {classes - 1}"
    )


def _check_alike(name: str, parts: dict[str, tuple[Images, Labels]]) -> None:
    """Raise BadDataError where the samples of two parts differ in shape, or their images in type."""
    images, labels = parts["train"]
    for part, (others, other_labels) in parts.items():
        for what, wanted, found in (
            ("images of shape", images.shape[1:], others.shape[1:]),
            ("images of type", images.dtype, others.dtype),
            ("labels of shape", labels.shape[1:], other_labels.shape[1:]),
        ):
            if wanted != found:
                raise BadDataError(f"{name}: training {what} {wanted} and {part} {what} {found}; they must be alike")


def _pieces(images: Images, channel: int) -> Iterator[NDArray[Any]]:
    """A channel of the images, (n, H, W), of so many that what is computed of them takes a few MiB."""
    count = max(1, PIXELS_AT_ONCE // math.prod(images.shape[1:3]))
    yield from (images[start : start + count, ..., channel] for start in range(0, len(images), count))


def _moments_of_bytes(images: Images, channel: int) -> tuple[float, float]:
    """Mean and deviation of bytes over 255, from how often each byte is there: the same bits on every machine."""
    counts = np.sum([np.bincount(some.ravel(), minlength=256) for some in _pieces(images, channel)], axis=0)
    of = list(enumerate(counts.tolist()))  # Python's whole numbers, whose quotients are rounded once
    n, total, squares = (sum(byte**power * count for byte, count in of) for power in range(3))
    return total / (255 * n), math.sqrt((n * squares - total**2) / (255 * n) ** 2)


def _moments_of_floats(images: Images, channel: int) -> tuple[float, float]:
    """Mean and deviation in float64, in which the sum of up to 2^29 equal numbers is exact: their deviation is 0."""

    def mean(power: int, centre: float) -> float:
        total = sum(float(((some.astype(np.float64) - centre) ** power).sum()) for some in _pieces(images, channel))
        return total / images[..., channel].size

    middle = mean(1, 0.0)
    return middle, math.sqrt(mean(2, middle))
