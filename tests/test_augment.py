"""Training images changed at random: what becomes of each pixel, who draws what, and what is left as it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distconv.config import Config
from distconv.data.__main__ import main
from distconv.data.augment import DRAWS, MOST, PRESETS, Augmentation, Augmented, named_augmentation
from distconv.data.dataset import Dataset
from distconv.errors import UsageError
from distconv.kernels.cpu import arithmetic as cpu
from distconv.kernels.cpu.device import Cpu
from distconv.nn.layers import Context
from distconv.run.build import augmented
from tests import jobs, reference
from tests.test_failures import QUICK, assert_one_sentence
from tests.test_same_code import on_two, two_folders

Amounts = tuple[float, ...]
# The numbers that turn, scale, shift and so on by nothing, and mirror nothing.
RESTING = np.full(DRAWS, 0.5)
PLACES = {"turn": 0, "down": 4, "across": 5, "mirror": 6, "light": 7, "hole_h": 8, "hole_w": 9}


def images(*shape: int, dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng(sum(shape)).random(shape).astype(dtype)


def amounts(**given: float) -> Amounts:
    return dataclasses.astuple(Augmentation(**given))


def warp(x: np.ndarray, of: Amounts, **numbers: float) -> np.ndarray:
    """All images of x, changed alike by these numbers and by resting ones."""
    drawn = np.tile(RESTING, (len(x), 1))
    for name, number in numbers.items():
        drawn[:, PLACES[name]] = number
    return cpu.warp(x, drawn, of)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(4, 7, 10, 3), (4, 9, 6, 1), (2, 1, 5, 1)])
@pytest.mark.parametrize(
    "of",
    [
        {"rotate": 180.0},
        {"shift": 0.6},
        {"scale": 0.9},
        {"crop": 3.0, "flip": 1.0},
        {"brightness": 1.0, "erase": 0.7},
        {"rotate": 40.0, "shift": 0.2, "scale": 0.3, "crop": 1.0, "flip": 1.0, "brightness": 0.5, "erase": 0.4},
    ],
    ids=lambda of: ",".join(of),
)
def test_every_pixel_is_that_of_the_slow_loops(
    of: dict[str, float], shape: tuple[int, ...], dtype: Any, tolerance: float
) -> None:
    x, rng = images(*shape, dtype=dtype), np.random.default_rng(3)
    x.flags.writeable = False
    numbers = rng.random((len(x), DRAWS), np.float32)
    y = cpu.warp(x, numbers, amounts(**of))
    assert y.dtype == dtype
    np.testing.assert_allclose(y, reference.warp(x, numbers, amounts(**of)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_amounts_of_0_change_no_bit_whatever_is_drawn(dtype: Any) -> None:
    x = images(5, 7, 4, 2, dtype=dtype)
    y = cpu.warp(x, np.random.default_rng(0).random((5, DRAWS), np.float32), amounts())
    np.testing.assert_array_equal(y, x, strict=True)
    assert not np.shares_memory(x, y)


@pytest.mark.parametrize("down", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("across", [-2, 0, 1])
def test_a_crop_moves_whole_pixels_and_a_mirror_swaps_left_and_right(down: int, across: int) -> None:
    x, of = images(2, 5, 6, 3), amounts(crop=2, flip=1)
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    moved = padded[:, 2 - down : 7 - down, 2 - across : 8 - across]
    for end in (0.02, 0.98):  # of the part of 0 to 1 that gives this move
        numbers = {"down": (down + 2 + end) / 5, "across": (across + 2 + end) / 5}
        np.testing.assert_array_equal(warp(x, of, **numbers, mirror=0.5), moved)
        np.testing.assert_array_equal(warp(x, of, **numbers, mirror=0.49), moved[:, :, ::-1])


def test_cifar_pads_by_4_cuts_any_32_by_32_out_and_mirrors_half_of_them() -> None:
    """As He et al. 2016 (arXiv 1512.03385, section 4.2) train on CIFAR-10; the probability is that of a fair draw."""
    N, x = 8100, images(1, 32, 32, 3, dtype=np.float32) + 1
    padded = np.pad(x[0], ((4, 4), (4, 4), (0, 0)))
    crops = [padded[down : down + 32, across : across + 32] for down in range(9) for across in range(9)]
    possible = {crop[:, ::way].tobytes(): (n, way) for n, crop in enumerate(crops) for way in (1, -1)}
    context = Context(training=True, samples=np.arange(N), kernels=Cpu())
    drawn = [possible[image.tobytes()] for image in named_augmentation("cifar")(np.repeat(x, N, axis=0), context)]
    counts = np.bincount([n for n, _ in drawn], minlength=81)
    assert ((counts - N / 81) ** 2).sum() / (N / 81) < 130  # chi-squared of 80 degrees: 3 in 10,000 are above
    assert abs(sum(way for _, way in drawn)) < 4 * np.sqrt(N)


@pytest.mark.parametrize("turn", [0.0, 1.0])
def test_half_a_turn_is_the_most_and_puts_the_last_pixel_first(turn: float) -> None:
    x = images(2, 5, 8, 3)
    np.testing.assert_allclose(warp(x, amounts(rotate=180), turn=turn), x[:, ::-1, ::-1], rtol=0, atol=1e-12)


def test_quarter_turns_go_both_ways() -> None:
    x = images(2, 6, 6, 1)
    for turn, way in ((0.0, 1), (1.0, -1)):
        wanted = np.rot90(x, way, axes=(1, 2))
        np.testing.assert_allclose(warp(x, amounts(rotate=90), turn=turn), wanted, rtol=0, atol=1e-12)


def test_light_and_what_is_erased() -> None:
    x, of = 1 + images(1, 8, 10, 2), amounts(brightness=0.5, erase=0.5)
    for light, factor in ((0.0, 0.5), (0.75, 1.25), (1.0, 1.5)):
        wanted = factor * x
        wanted[:, 2:6, 3:7] = 0  # 4 by 4 pixels: half of the shorter side
        np.testing.assert_allclose(warp(x, of, light=light), wanted, rtol=1e-15, atol=0)
    corner = warp(x, of, hole_h=0.0, hole_w=1.0)
    assert np.argwhere(corner[0, :, :, 0] == 0).tolist() == [[0, 8], [0, 9], [1, 8], [1, 9]]


def test_what_names_say() -> None:
    assert named_augmentation("mnist") == Augmentation(rotate=15, shift=0.1, scale=0.1)
    assert named_augmentation("cifar") == Augmentation(crop=4, flip=1)
    assert named_augmentation("rotate=3, flip,erase=.25") == Augmentation(rotate=3, flip=1, erase=0.25)
    assert named_augmentation("mnist,crop=2") == Augmentation(rotate=15, shift=0.1, scale=0.1, crop=2)
    assert named_augmentation("mnist,rotate=5").rotate == 5  # type: ignore[attr-defined]
    assert [field.name for field in dataclasses.fields(Augmentation)] == list(MOST)
    for name, most in MOST.items():
        assert named_augmentation(f"{name}={most}") == Augmentation(**{name: most})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "'nonsense' is neither one of mnist, cifar nor of rotate, shift"),
        ("mnist=3", "'mnist=3' is neither"),
        ("flip=1,", "'' is neither"),
        ("rotate=200", "rotate=200: a number from 0 to 180 was expected"),
        ("rotate=-1", "rotate=-1: a number from 0"),
        ("flip=2", "flip=2: a whole number from 0 to 1 was expected"),
        ("crop=1.5", "crop=1.5: a whole number from 0"),
        ("crop=nan", "crop=nan: a whole number from 0"),
        ("crop=inf", "crop=inf: a whole number from 0"),
        ("shift=nan", "shift=nan: a number from 0 to 1 was expected"),
        ("rotate", "rotate takes a number, but '' was given"),
        ("rotate=far", "rotate takes a number, but 'far' was given"),
        ("nothing.here:at_all", "there is no module nothing"),
        ("nothing.py:at_all", "a module is named without .py, nothing:at_all say"),
        ("tests.files:at_all", "has no function at_all"),
        ("tests.test_augment:colours", "is called with 2 arguments, which it does not take"),
    ],
)
def test_what_no_augmentation_is_named_so_is_one_sentence(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        named_augmentation(text)
    assert words in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_images_whose_labels_are_maps_are_left_to_the_user() -> None:
    maps = SimpleNamespace(label_shape=(5, 6))
    with pytest.raises(UsageError, match=r"--augment mnist would change images and leave .*\(5, 6\)"):
        augmented(maps, "mnist")  # type: ignore[arg-type]
    assert augmented(maps, "tests.test_augment:images").data is maps  # type: ignore[attr-defined, arg-type]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((np.zeros((2, 5)), np.zeros(2)), r"the data gave float64 of shape \(2, 5\): leave it out"),
        ((np.zeros((2, 5, 5, 1), int), np.zeros(2)), r"the data gave int64 of shape"),
        (([1.0, 2.0], np.zeros(2)), "the data gave a list"),
        (np.zeros((2, 5, 5, 1)), "batches are images and labels"),
        ((np.zeros((2, 5, 5, 1)), np.zeros(2), np.zeros(2)), "batches are images and labels"),
    ],
)
def test_what_is_no_batch_of_images_is_one_sentence(given: Any, words: str) -> None:
    own = SimpleNamespace(batch=lambda part, samples, context: given)
    context = Context(training=True, samples=np.arange(2))
    with pytest.raises(UsageError, match=words):
        augmented(own, "mnist").batch("train", context.samples, context)  # type: ignore[arg-type]


def dataset() -> Dataset:
    rng = np.random.default_rng(0)
    pictures, labels = rng.integers(0, 256, (20, 6, 8, 1), np.uint8), rng.integers(0, 3, 20, np.uint8)
    return Dataset("noise", pictures[:15], labels[:15], pictures[15:], labels[15:], classes=3)


def batch(samples: Any, step: int = 7, seed: int = 0, part: str = "train", training: bool = True) -> np.ndarray:
    """The images of some samples in a step."""
    samples, data = np.asarray(samples), dataset()
    context = Context(training=training, seed=seed, step=step, samples=samples, kernels=Cpu(np.float64))
    changed = Augmented(data, named_augmentation("mnist,flip,crop=1,brightness=0.3,erase=0.3"))
    x, labels = changed.batch(part, samples, context)
    np.testing.assert_array_equal(labels, data.batch(part, samples, context)[1])
    assert (changed.size(part), changed.digest) == (data.size(part), data.digest)
    return x


def test_a_sample_is_changed_by_seed_step_and_sample_alone() -> None:
    samples = np.arange(15)[::-1]
    whole = batch(samples)
    np.testing.assert_array_equal(np.concatenate([batch(samples[:4]), batch(samples[4:5]), batch(samples[5:])]), whole)
    np.testing.assert_array_equal(batch([3, 9]), whole[[11, 5]])
    for other in (batch(samples, step=8), batch(samples, seed=1)):
        assert (other != whole).any(axis=(1, 2, 3)).all()
    context = Context(training=True, samples=samples, kernels=Cpu())
    alike = named_augmentation("mnist")(np.ones((15, 6, 8, 1), np.float32), context)
    assert len({image.tobytes() for image in alike}) == 15


@pytest.mark.parametrize(("part", "training"), [("train", False), ("test", False), ("test", True)])
def test_images_that_are_evaluated_stay_as_they_are(part: str, training: bool) -> None:
    context = Context(training=training, samples=np.arange(4), kernels=Cpu(np.float64))
    plain, _ = dataset().batch(part, context.samples, context)
    np.testing.assert_array_equal(batch(np.arange(4), part=part, training=training), plain, strict=True)


def test_presets_can_be_read_in_the_help() -> None:
    help_text = next(f.metadata["help"] for f in dataclasses.fields(Config) if f.name == "augment")
    assert all(name in help_text for name in (*PRESETS, *MOST))


MINE = """
import numpy as np

def darker(x, context):
    assert context.training and len(x) == len(context.samples) and x.shape[1:] == (28, 28, 1)
    return x * (0.5 + 0.25 * context.uniform(1).reshape(-1, 1, 1, 1))
"""


def test_a_function_of_the_users_own_changes_images_and_must_be_the_same_everywhere(tmp_path: Path) -> None:
    first, second = two_folders(tmp_path, lambda to: (to / "mine.py").write_text(MINE))
    flags = ("distconv.train", *QUICK, "--model", "simpleconvnet", "--epochs", "1", "--augment", "mine:darker", "--out")
    result = on_two(first, second, *flags, tmp_path / "run")
    assert result.returncode == 0, result.stderr
    (second / "mine.py").write_text(MINE.replace("0.25", "0.24"))
    result = on_two(first, second, *flags, tmp_path / "other")
    assert_one_sentence(result, 78, "the code of mine:darker: rank 1 differs from rank 0")


def colours() -> Dataset:
    """Fewer images than a picture has rows, in colour and not square."""
    images, labels = np.random.default_rng(0).integers(0, 256, (5, 6, 9, 3), np.uint8), np.uint8([0, 1, 0, 1, 0])
    return Dataset("colours", images, labels, images, labels, classes=2)


@pytest.mark.parametrize("name", ["digits", "tests.test_augment:colours"])
def test_a_picture_shows_what_is_made_of_images(name: str, tmp_path: Path) -> None:
    png = tmp_path / "shown.png"
    result = jobs.Job(0, ["-m", "distconv.data", "show", name, "--augment", "mnist,flip", "--png", png]).finish(60)
    assert result.returncode == 0, result.stderr
    assert png.read_bytes().startswith(b"\x89PNG") and str(png) in result.stdout


@pytest.mark.parametrize("seed", ["-1", str(2**64)])
def test_a_seed_of_a_picture_is_one_that_a_run_may_have(seed: str) -> None:
    with pytest.raises(UsageError, match=r"--seed .*expected a whole number from 0"):
        main(["show", "digits", "--seed", seed])


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    arguments = ["-m", "distconv.data", "show", "digits", "--png", tmp_path / "nowhere" / "shown.png"]
    result = jobs.Job(0, arguments).finish(60)
    assert result.returncode == 73
    (sentence,) = result.stderr.splitlines()
    assert "shown.png" in sentence
