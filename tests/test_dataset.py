"""Data sets in memory: what fits together, what tells them apart, what is held out of training."""

from __future__ import annotations

import dataclasses
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distconv.data import dataset as module
from distconv.data import digits, mnist
from distconv.data.dataset import Dataset
from distconv.errors import BadDataError, UsageError
from distconv.kernels.cpu.arithmetic import pixels
from distconv.kernels.cpu.device import Cpu
from tests.files import NAMES, assert_holds, peak_memory, small_set

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = small_set().values()


def dataset(**changed: Any) -> Dataset:
    """A small data set, with some of its parts replaced."""
    whole = {"train_images": TRAIN_IMAGES, "train_labels": TRAIN_LABELS}
    whole |= {"test_images": TEST_IMAGES, "test_labels": TEST_LABELS}
    return Dataset("mine", **{**whole, **changed})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        *(
            ({"classes": odd}, "mine: classes is .* 2 to 2147483647")
            for odd in (0, 1, -1, 2**31, 2.0, "10", None, True)
        ),
        ({"train_images": TRAIN_IMAGES / 255}, r"mine, train: images are float64.* \.astype\(np.float32\)"),
        ({"train_images": TRAIN_IMAGES.astype(np.float16)}, "mine, train: images are float16"),
        ({"test_images": TEST_IMAGES.astype(np.int16)}, "mine, test: images are int16"),
        ({"train_labels": TRAIN_LABELS.astype(float)}, r"mine, train: labels are float64.* \.astype\(np.int64\)"),
        ({"train_labels": TRAIN_LABELS.astype(str)}, "mine, train: labels are <U3.*: number the classes from 0"),
        ({"train_labels": TRAIN_LABELS.astype(object)}, "mine, train: labels are object.*: number the classes from 0"),
        ({"train_labels": np.uint8(3)}, "mine, train: labels are a uint8, but a NumPy array"),
        ({"train_labels": np.array(3)}, r"mine, train: labels .*\(\)"),
        ({"train_labels": TRAIN_LABELS.astype(np.int64) - 2}, r"mine, train: label number \d is -\d; .* 0 to 9"),
        ({"train_labels": TRAIN_LABELS + np.uint64(2**63)}, r"mine, train: label number 0 is 922\d+; .* 0 to 9"),
        ({"train_images": TRAIN_IMAGES.reshape(6, -1)}, r"mine, train: images .*\(6, 20\)"),
        ({"test_images": TEST_IMAGES[..., None, None]}, "mine, test: images .* dimensions"),
        ({"test_labels": np.eye(4, 10, dtype=np.uint8)}, r"labels of shape \(\) and test labels .*\(10,\).* alike"),
        ({"train_labels": np.zeros((6, 0), int)}, r"6 labels of shape \(0,\); .* number"),
        ({"test_images": TEST_IMAGES.astype(np.float32)}, "images of type uint8 and test images of type float32"),
        ({"validation_images": TEST_IMAGES}, "mine, validation: labels are a NoneType"),
        ({"validation_labels": TEST_LABELS}, "mine, validation: images are a NoneType"),
        ({"validation_images": TEST_IMAGES[:, 1:], "validation_labels": TEST_LABELS}, "validation images .* alike"),
        ({"validation_images": TEST_IMAGES, "validation_labels": TEST_LABELS + 99}, "mine, validation: label number 0"),
        ({"train_labels": TRAIN_LABELS[:5]}, "mine, train: .* 6 images and 5 labels"),
        ({"test_images": TEST_IMAGES[:0], "test_labels": TEST_LABELS[:0]}, "mine, test: .* 0 images"),
        ({"test_labels": np.array([0, 1, 12, 11], np.uint8)}, "mine, test: label number 2 is 12; .* 0 to 9"),
        ({"classes": 3, "train_labels": np.array([0, 1, 2, 3, 2, 1], np.uint8)}, "number 3 is 3; .* 0 to 2"),
        ({"test_images": TEST_IMAGES[:, :, 1:]}, "alike"),
        ({"test_images": np.stack([TEST_IMAGES] * 3, axis=-1)}, "alike"),
        ({"train_images": TRAIN_IMAGES.tolist()}, "mine, train: images are a list, but a NumPy array"),
        ({"test_labels": [0, 1, 2, 3]}, "mine, test: labels are a list, but a NumPy array"),
        ({"test_images": None}, "mine, test: images are a NoneType"),
        ({"class_names": ("a", "b")}, "mine: class_names is 2 names, but a tuple of 10"),
        ({"class_names": "abcdefghij"}, "mine: class_names is a str, but a tuple of 10"),
        ({"class_names": ["a"] * 9 + [10]}, "mine: the name of class 9 is 10, but printable text"),
        ({"class_names": ["a", ""] + ["b"] * 8}, "mine: the name of class 1 is '', but printable text"),
        ({"class_names": ["a"] * 9 + ["a\nb"]}, r"mine: the name of class 9 is 'a\\nb', but printable text"),
        ({"train_images": TRAIN_IMAGES[:, :0]}, r"6 images of shape \(0, 4\); .* pixel"),
        ({"train_images": TRAIN_IMAGES[..., None][..., :0]}, r"6 images of shape \(5, 4, 0\); .* pixel"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(BadDataError, match=words):
        dataset(**changed)


def test_images_without_channels_get_one_and_colours_stay() -> None:
    assert dataset().image_shape == (5, 4, 1)
    np.testing.assert_array_equal(dataset().test_images[..., 0], TEST_IMAGES)
    colours = {name: np.stack([images] * 3, -1) for name, images in (("train_images", TRAIN_IMAGES),)}
    colours["test_images"] = np.stack([TEST_IMAGES, 255 - TEST_IMAGES, TEST_IMAGES], -1)
    assert dataset(**colours).image_shape == (5, 4, 3)
    np.testing.assert_array_equal(dataset(**colours).test_images, colours["test_images"])


def test_the_number_of_classes_may_be_numpys() -> None:
    assert type(dataset(classes=np.uint8(10)).classes) is int  # what JSON can hold


def test_names_of_classes_are_kept_in_every_part_and_do_not_count_as_content() -> None:
    names = [np.str_(f"class {n}") for n in range(10)]
    named = dataset(class_names=names)
    assert named.class_names == named.limited(2).class_names == named.split_validation(2).class_names == tuple(names)
    assert {type(name) for name in named.class_names or ()} == {str}  # what JSON can hold
    assert dataset().class_names is None and named.digest == dataset().digest


def exact_moments(images: np.ndarray, unit: int) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel over `unit`, in fractions; the root alone is rounded before it is."""
    means, deviations = [], []
    for c in range(images.shape[-1]):
        values = [Fraction(value) / unit for value in images[..., c].ravel().tolist()]
        mean = sum(values) / len(values)
        means.append(float(mean))
        deviations.append(math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)) or 1.0)
    return means, deviations


def colours(dtype: Any, N: int = 7) -> Dataset:
    """Images of four channels of unlike brightness, the third the same everywhere."""
    images = np.random.default_rng(3).integers(0, 256, (N, 9, 8, 4), np.uint8).astype(dtype)
    images[..., 1] //= 5
    images[..., 2] = 77
    images[..., 3] = images[..., 3] // 250 + 7 if dtype == np.uint8 else images[..., 3] / 7 - 1e4
    return Dataset("mine", images, np.zeros(N, int), images[:1], np.zeros(1, int))


@pytest.mark.parametrize("at_once", [1, 3 * 72, 1 << 18])  # pixels: an image, three of them, all
def test_means_and_deviations_of_bytes_are_the_exact_ones_of_what_the_model_is_given(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(module, "PIXELS_AT_ONCE", at_once)
    whole = colours(np.uint8)
    means, deviations = exact_moments(whole.train_images, 255)
    assert whole.channel_means.tolist() == means and whole.channel_deviations.tolist() == deviations
    assert whole.channel_means.dtype == whole.channel_deviations.dtype == np.float64 and deviations[2] == 1


@pytest.mark.parametrize("at_once", [1, 1 << 18])
def test_means_and_deviations_of_floats_are_those_of_the_numbers(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(module, "PIXELS_AT_ONCE", at_once)
    whole = colours(np.float32)
    means, deviations = exact_moments(whole.train_images, 1)
    np.testing.assert_allclose(whole.channel_means, means, rtol=1e-14)
    np.testing.assert_allclose(whole.channel_deviations, deviations, rtol=1e-12)
    equal = np.full((3000, 9, 8, 1), np.float32(0.1))
    alike = Dataset("mine", equal, np.zeros(3000, int), equal[:1], np.zeros(1, int))
    assert alike.channel_means[0] == np.float32(0.1) and alike.channel_deviations[0] == 1  # to the bit


def test_means_and_deviations_are_of_the_training_images_that_are_left() -> None:
    whole = colours(np.uint8, N=40)
    assert whole.channel_means.shape == whole.channel_deviations.shape == (4,)
    assert dataset().channel_means.shape == (1,)
    for part in (whole.limited(11), whole.split_validation(13), whole.split_validation(13).limited(5)):
        means, deviations = exact_moments(part.train_images, 255)
        assert part.channel_means.tolist() == means and part.channel_deviations.tolist() == deviations


def test_means_and_deviations_take_little_memory() -> None:
    images = np.zeros((4000, 32, 32, 3), np.uint8)
    whole = Dataset("mine", images, np.zeros(4000, int), images[:1], np.zeros(1, int))
    assert peak_memory(lambda: whole.channel_deviations) < 4 << 20


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["?", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"])
def test_integer_labels_of_any_width_sign_and_order_are_the_same_labels(kind: str, order: str) -> None:
    largest = 2**31 - 2 if kind[1:] in ("4", "8") else 1 if kind == "?" else np.iinfo(kind).max
    given = np.array([largest, 0, 1, 0, 1, 0]).astype(order + kind)
    whole = dataset(classes=max(2, largest + 1), train_labels=given, test_labels=given[:4])
    for mine, theirs in ((whole.train_labels, given), (whole.test_labels, given[:4])):
        np.testing.assert_array_equal(mine, theirs)
        assert mine.dtype in (np.uint8, np.uint16, np.int32, np.int64) and mine.itemsize == given.itemsize
        assert mine.dtype.isnative


def test_labels_of_several_widths_are_held_in_the_widest() -> None:
    whole = dataset(train_labels=TRAIN_LABELS.astype(np.uint16))
    assert whole.train_labels.dtype == whole.test_labels.dtype == np.uint16
    np.testing.assert_array_equal(whole.test_labels, TEST_LABELS)


def test_labels_may_belong_to_pixels_and_a_wrong_one_is_found_there() -> None:
    labels = {"train_labels": TRAIN_IMAGES % np.uint8(3), "test_labels": TEST_IMAGES % np.uint8(3)}
    whole = dataset(classes=3, **labels)
    assert whole.label_shape == (5, 4) and dataset().label_shape == ()
    np.testing.assert_array_equal(whole.limited(2).train_labels, labels["train_labels"][:2])
    labels["test_labels"][2, 4, 1] = 3
    with pytest.raises(BadDataError, match=r"mine, test: label number 2 at \(4, 1\) is 3; .* 0 to 2"):
        dataset(classes=3, **labels)


def floats(**changed: Any) -> Dataset:
    """The small data set with images of float32."""
    images = {"train_images": TRAIN_IMAGES, "test_images": TEST_IMAGES}
    return dataset(**{name: array.astype(np.float32) - 99.5 for name, array in images.items()}, **changed)


def test_float32_images_reach_the_model_as_they_are() -> None:
    whole = floats()
    every = np.arange(len(TEST_IMAGES))
    x, labels = Cpu(np.float64).gather(whole.test_images, whole.test_labels, every)
    assert x.dtype == np.float64 and labels.tolist() == whole.test_labels.tolist()
    np.testing.assert_array_equal(x[..., 0], TEST_IMAGES - 99.5)
    Cpu().gather(whole.test_images, whole.test_labels, every)[0][...] = 0  # a layer may write into what it is given
    assert whole.test_images.any()


@given(part=st.sampled_from(["train_images", "test_images"]), value=st.sampled_from([np.nan, np.inf, -np.inf]),
       place=st.integers(0, 4 * 5 * 4 - 1), order=st.sampled_from("<>"))  # fmt: skip
def test_a_number_that_is_not_finite_is_found_where_it_is(part: str, value: float, place: int, order: str) -> None:
    whole = floats()
    images = getattr(whole, part).astype(f"{order}f4")
    images.reshape(-1)[place] = value
    image, *pixel = map(int, np.unravel_index(place, images.shape))
    expected = f"mine, {part.split('_')[0]}: image number {image} holds {value} at {tuple(pixel)}"
    with pytest.raises(BadDataError, match=re.escape(expected)):
        dataclasses.replace(whole, **{part: images})


def test_numbers_are_looked_at_behind_the_first_thousands_too() -> None:
    images = np.zeros((3000, 2, 2), np.float32)
    images[2500, 1, 0] = np.nan
    with pytest.raises(BadDataError, match=r"image number 2500 holds nan at \(1, 0\)"):
        Dataset("mine", images, np.zeros(3000, np.int64), images[:1], np.zeros(1, np.int64))


def test_arrays_that_lie_otherwise_in_memory_are_the_same_data() -> None:
    turned = dataset(
        train_images=np.asfortranarray(TRAIN_IMAGES),
        train_labels=np.repeat(TRAIN_LABELS, 2)[::2],
        test_images=np.stack([TEST_IMAGES] * 2, axis=1)[:, 1],
    )
    turned.train_images.flags.writeable = False
    assert turned.digest == dataset().digest
    assert all(array.flags.c_contiguous for array in (turned.train_images, turned.train_labels, turned.test_images))
    assert np.shares_memory(dataset().train_images, TRAIN_IMAGES)  # what lies well is not copied


def flipped(array: np.ndarray, place: int) -> np.ndarray:
    """A copy with the lowest bit of one element flipped."""
    array = array.copy()
    array.reshape(-1)[place] ^= 1
    return array


def test_the_digest_tells_every_change_of_content_and_shape() -> None:
    several = [
        dataset(),
        *(dataset(train_images=flipped(TRAIN_IMAGES, place)) for place in (0, 60, -1)),
        *(dataset(test_images=flipped(TEST_IMAGES, place)) for place in (0, -1)),
        dataset(train_labels=flipped(TRAIN_LABELS, 3)),
        dataset(test_labels=flipped(TEST_LABELS, -1)),
        dataset(train_images=TRAIN_IMAGES[::-1]),
        # The same bytes in another shape.
        dataset(train_images=TRAIN_IMAGES.reshape(6, 4, 5), test_images=TEST_IMAGES.reshape(4, 4, 5)),
        dataset(train_images=TRAIN_IMAGES.reshape(6, 1, 5, 4), test_images=TEST_IMAGES.reshape(4, 1, 5, 4)),
    ]
    assert len({one.digest for one in several}) == len(several)


def test_the_digest_of_bytes_is_what_checkpoints_of_older_versions_hold(mnist_folder: Path) -> None:
    assert digits.load().digest == "38bc32f4fd50f8edaa514e905e184f05a54523fa57959289db5c54b051170fe3"
    loaded = mnist.load_folder(mnist_folder)
    assert loaded.digest == "c1a44cd987adea06a723558e60762a763befa3cccc6bcbb05653f86cf68f5530"
    assert loaded.limited(1000).digest == "157893d7936710986fe68a18f16f6f057f9b08d7f68a98a250f5b90f189ac842"


def test_the_digest_tells_types_and_where_a_sample_belongs() -> None:
    wide = (dataset(train_labels=TRAIN_LABELS.astype(kind)) for kind in (np.uint16, np.int32, np.int64))
    validation = dataset(validation_images=TEST_IMAGES, validation_labels=TEST_LABELS)
    several = [dataset(), floats(), *wide, validation, dataset().split_validation(2)]
    assert len({one.digest for one in several}) == len(several)


def test_the_digest_is_of_the_content_alone() -> None:
    turned = np.asfortranarray(TRAIN_IMAGES)
    assert not turned.flags.c_contiguous
    again = dataclasses.replace(dataset(train_images=turned[..., None]), name="the same elsewhere")
    assert again.digest == dataset().digest


def test_limited_keeps_the_first_training_samples_and_all_of_the_test() -> None:
    whole = dataset()
    part = whole.limited(2)
    assert_holds(part, dict(zip(NAMES, (TRAIN_IMAGES[:2], TRAIN_LABELS[:2], TEST_IMAGES, TEST_LABELS), strict=True)))
    assert len(whole.train_labels) == 6 and part.digest != whole.digest
    assert whole.limited(100).digest == whole.digest
    with pytest.raises(UsageError, match="0 training samples"):
        whole.limited(0)


def numbered(count: int) -> Dataset:
    """Samples that can be told apart: image i and its label hold i."""
    labels = np.arange(count, dtype=np.uint16)
    images = np.broadcast_to(labels.astype(np.float32)[:, None, None], (count, 2, 3))
    return Dataset("mine", images, labels, images[:1], labels[:1], classes=count + 2)


@settings(max_examples=30, deadline=None)
@given(total=st.integers(2, 300), data=st.data())
def test_a_validation_set_is_held_out_of_training_the_same_one_every_time(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total - 1))
    whole = numbered(total)
    part = whole.split_validation(count)
    held = part.validation_labels
    assert held is not None and part.validation_images is not None and len(held) == count
    assert sorted([*held, *part.train_labels]) == list(range(total))  # each sample in one of the two
    assert np.all(np.diff(part.train_labels.astype(int)) > 0)  # the others keep their order
    for images, labels in ((part.train_images, part.train_labels), (part.validation_images, held)):
        np.testing.assert_array_equal(images[:, 0, 0, 0], labels)  # each image with its label
    assert part.test_labels.tolist() == whole.test_labels.tolist()
    assert numbered(total).split_validation(count).digest == part.digest
    smaller = whole.split_validation(data.draw(st.integers(1, count)))
    assert set(smaller.validation_labels.tolist()) <= set(held.tolist())
    limited = part.limited(data.draw(st.integers(1, total)))
    assert limited.validation_labels is held and set(limited.train_labels) <= set(part.train_labels)


def test_the_order_from_which_validation_is_taken_never_changes() -> None:
    held = numbered(10).split_validation(3).validation_labels
    assert held is not None and held.tolist() == [8, 9, 6]


def test_a_validation_set_that_cannot_be_held_out_is_told() -> None:
    for count in (-1, 0, 6, 7):
        with pytest.raises(UsageError, match=f"mine: {count} of 6 training samples .*: 1 to 5 can"):
            dataset().split_validation(count)
    with pytest.raises(UsageError, match="1 of 1 training samples cannot be held out: one must be left"):
        dataset().limited(1).split_validation(1)
    with pytest.raises(UsageError, match="a validation set of its own, 4 samples"):
        dataset(validation_images=TEST_IMAGES, validation_labels=TEST_LABELS).split_validation(1)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_pixels_are_bytes_over_255(dtype: type) -> None:
    images = np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1)
    x = pixels(images, dtype)
    assert x.dtype == dtype and x.shape == images.shape
    assert x.ravel()[0] == 0 and x.ravel()[255] == 1 and np.all(np.diff(x.ravel()) > 0)
    exact = np.array([value / 255 for value in range(256)])
    np.testing.assert_allclose(x.ravel().astype(np.float64), exact, rtol=np.finfo(dtype).eps, atol=0)
