"""Data sets by name: where a name leads, what is read on the way, and the digits that are built in."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from distconv import data
from distconv.data import digits, idx, mnist
from distconv.errors import BadDataError, CannotCreateError, MissingInputError, UsageError
from tests.files import NAMES, assert_holds, small_set, write_set


def test_the_digits_are_1437_and_360_images_of_28_x_28() -> None:
    loaded = digits.load()
    assert (len(loaded.train_labels), len(loaded.test_labels)) == (1437, 360)
    assert loaded.image_shape == (28, 28, 1) and loaded.classes == 10
    everything = np.bincount(loaded.train_labels) + np.bincount(loaded.test_labels)
    assert everything.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as its authors count
    assert np.bincount(loaded.test_labels).min() >= 20  # of 36: each digit is in the test


def exact_digits() -> tuple[np.ndarray, int]:
    """The enlarged digits in whole numbers, unrounded, and what to divide them by for brightness 0 to 255."""
    small = idx.read(Path(digits.__file__).parent / "optdigits-images-idx3-ubyte.gz", 3).astype(np.int64)
    places = np.clip(4 * np.arange(28) - 5, 0, 98)  # centres of the new pixels, in fourteenths of an old one
    weights = np.maximum(0, 14 - abs(places[:, None] - 14 * np.arange(8)))
    return np.einsum("ai,nij,bj->nab", weights, small * 255, weights), 16 * 14 * 14


def test_the_digits_are_their_originals_enlarged_and_span_the_same_brightness() -> None:
    exact, scale = exact_digits()
    loaded = digits.load()
    images = np.concatenate([loaded.train_images, loaded.test_images])[..., 0]
    assert images.min() == 0 and images.max() == 255
    by_brightness = np.sort(exact.sum((1, 2))) / scale
    assert abs(np.sort(images.sum((1, 2), dtype=np.int64)) - by_brightness).max() < 28 * 28 / 4


def test_the_digits_depend_on_no_order_of_floating_point_sums() -> None:
    # Many pixels lie exactly between two bytes. One rule for all of these gives the same bits on every machine.
    exact, scale = exact_digits()
    whole, rest = np.divmod(exact, scale)
    up, even = rest * 2 >= scale, rest * 2 + whole % 2 > scale
    rules = [{image.tobytes() for image in (whole + rule).astype(np.uint8)} for rule in (up, even)]
    loaded = digits.load()
    assert {image.tobytes() for image in (*loaded.train_images, *loaded.test_images)} in rules


@pytest.fixture
def no_mnist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without MNIST, whom no mirror answers."""
    for name in ("DISTCONV_DATA_DIR", "DISTCONV_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mnist, "MIRRORS", ())


@pytest.mark.usefixtures("no_mnist")
@pytest.mark.parametrize(("offline", "why"), [("1", "offline is set"), ("", "no mirror answers")])
def test_auto_without_mnist_becomes_the_digits_and_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, offline: str, why: str
) -> None:
    monkeypatch.setenv("DISTCONV_OFFLINE", offline)
    name, note = data.prepare("auto")
    assert name == "digits" and data.load(name).digest == digits.load().digest
    assert "\n" not in note and all(part in note for part in ("MNIST", why, "digits", "--data"))


@pytest.mark.usefixtures("no_mnist")
def test_mnist_asked_for_by_name_is_not_replaced_by_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DISTCONV_OFFLINE", "1")
    with pytest.raises(MissingInputError):
        data.prepare("mnist")
    monkeypatch.setenv("DISTCONV_OFFLINE", "")
    (tmp_path / "cache").write_text("a file in the folder's place")
    with pytest.raises(CannotCreateError):
        data.prepare("mnist")
    name, note = data.prepare("auto")
    assert name == "digits" and str(tmp_path / "cache") in note


@pytest.mark.usefixtures("no_mnist")
def test_auto_refuses_a_chosen_folder_that_is_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DISTCONV_DATA_DIR", str(write_set(tmp_path / "mine", small_set())))
    with pytest.raises(BadDataError, match=NAMES[0]):  # it is not MNIST
        data.load(data.prepare("auto")[0])


@pytest.mark.usefixtures("no_mnist")
def test_auto_refuses_a_chosen_folder_that_lacks_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DISTCONV_DATA_DIR", str(tmp_path))
    for name in ("auto", "mnist"):
        with pytest.raises(MissingInputError, match=f"{tmp_path} holds neither"):
            data.prepare(name)


@pytest.mark.parametrize("asked", ["auto", "mnist", "folder"])
def test_a_start_reads_and_verifies_each_file_once(
    mnist_folder: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setenv("DISTCONV_DATA_DIR", str(mnist_folder))
    count_reads = mock.patch.object(idx, "read", wraps=idx.read)
    count_hashes = mock.patch("hashlib.sha256", wraps=hashlib.sha256)
    with count_reads as read, count_hashes as hashed:
        name, note = data.prepare(str(mnist_folder) if asked == "folder" else asked)
        assert note == "" and len(data.load(name).train_labels) == 60_000
    assert len({call.args[0] for call in read.mock_calls}) == len(read.mock_calls) == len(hashed.mock_calls) == 4


def test_a_folder_is_named_by_its_path_even_where_it_looks_like_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = small_set()
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "odd:name", str(tmp_path / "with space")):
        write_set(tmp_path / name, arrays)
        assert data.prepare(name) == (name, "")
        assert_holds(data.load(name), arrays)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, "does not exist") for name in ("MNIST", "", "none/at/all", "a\0b", "x" * 300)),
        *((name, "is neither a folder nor an .npz or .tar.gz file") for name in ("mine.zip", "images.npy")),
        ("photos", r"is a folder without .*\(of pictures, docs/data.md makes an .npz\)"),
    ],
)
def test_a_name_that_leads_to_no_data_set_is_answered_by_all_that_may_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("mine.zip", "images.npy", "photos/cat/1.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(MissingInputError, match=words) as caught:
        data.load(name)
    for possible in ("mnist, cifar10 or digits", ".npz", "x_train", *NAMES, "package.module:function"):
        assert possible in str(caught.value)


USERS_MODULE = """
import numpy as np
from distconv.data import Dataset
images, labels = np.zeros((4, 5, 3), np.uint8), np.arange(4, dtype=np.uint8)
def mine(): return Dataset("mine", images, labels, images[:2], labels[:2], classes=4)
def arrays(): return images, labels
def nothing(): pass
number = 3
"""


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module into the current folder, returns its name; the next test finds no trace of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "modules", sys.modules.copy())

    def write(text: str) -> str:
        (tmp_path / "users_module.py").write_text(text)
        return "users_module"

    return write


def test_a_users_function_gives_the_data_set(users_module: Callable[[str], str]) -> None:
    name = f"{users_module(USERS_MODULE)}:mine"
    assert data.prepare(name) == (name, "")
    loaded = data.load(name)
    assert loaded.image_shape == (5, 3, 1) and loaded.classes == 4


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("arrays", "returned tuple, but something like a .*Dataset is expected"),
        ("nothing", "returned NoneType"),
        ("number", "has no function number"),
        ("absent", "has no function absent"),
    ],
)
def test_a_users_function_that_gives_no_data_set_is_a_usage_error(
    users_module: Callable[[str], str], function: str, words: str
) -> None:
    with pytest.raises(UsageError, match=f"users_module:{function}.*{words}"):
        data.load(f"{users_module(USERS_MODULE)}:{function}")


def test_a_module_that_is_not_there_is_told_from_one_that_lacks_something(users_module: Callable[[str], str]) -> None:
    with pytest.raises(UsageError, match="there is no module no_such_module"):
        data.load("no_such_module:mine")
    name = users_module("import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):  # the user's own mistake, with a traceback
        data.load(f"{name}:mine")


def test_what_a_users_function_raises_comes_through(users_module: Callable[[str], str]) -> None:
    with pytest.raises(ZeroDivisionError):
        data.load(f"{users_module('def mine(): return 1 / 0')}:mine")
