"""Data sets in .npz files: what is read, which axis holds the channels, and one sentence for every other file."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distconv import data
from distconv.data.dataset import Dataset
from distconv.errors import BadDataError, MissingInputError
from tests.files import peak_memory
from tests.jobs import run

RANDOM = np.random.default_rng(0)
GIVEN = {
    "x_train": RANDOM.integers(0, 256, (6, 8, 7), np.uint8),
    "y_train": np.array([3, 0, 1, 2, 2, 1]),
    "x_test": RANDOM.integers(0, 256, (4, 8, 7), np.uint8),
    "y_test": np.array([0, 3, 1, 1]),
}


def written(folder: Path, save: Callable[..., None] = np.savez, **changed: Any) -> Path:
    """A file with the small data set, some arrays replaced, added, or (None) left out."""
    path = folder / "mine.npz"
    save(path, **{name: array for name, array in {**GIVEN, **changed}.items() if array is not None})
    return path


def load(path: Path, say: Callable[[str], None] = lambda line: None) -> Dataset:
    return data.load(str(path), say)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_was_saved_is_loaded(tmp_path: Path, save: Callable[..., None]) -> None:
    path = written(tmp_path, save)
    assert data.prepare(str(path)) == (str(path), "")
    loaded = load(path)
    for name, mine in (("x_train", loaded.train_images[..., 0]), ("x_test", loaded.test_images[..., 0])):
        np.testing.assert_array_equal(mine, GIVEN[name])
    np.testing.assert_array_equal(loaded.train_labels, GIVEN["y_train"])
    np.testing.assert_array_equal(loaded.test_labels, GIVEN["y_test"])
    assert loaded.classes == 4 and loaded.validation_labels is None and loaded.train_labels.dtype == np.int64
    assert loaded.digest == Dataset("the same", *GIVEN.values(), classes=4).digest


def test_validation_and_the_number_of_classes_may_be_in_the_file(tmp_path: Path) -> None:
    validation = {"x_validation": GIVEN["x_test"], "y_validation": np.array([0, 5, 1, 1])}
    loaded = load(written(tmp_path, **validation))
    assert loaded.classes == 6 and loaded.validation_images is not None
    np.testing.assert_array_equal(loaded.validation_images[..., 0], GIVEN["x_test"])
    assert loaded.validation_labels is not None and loaded.validation_labels.tolist() == [0, 5, 1, 1]
    assert load(written(tmp_path, classes=9, **validation)).classes == 9


def test_the_names_of_the_classes_may_be_in_the_file_and_count_them(tmp_path: Path) -> None:
    names = [f"class {n}" for n in range(7)]
    loaded = load(written(tmp_path, class_names=np.array(names)))
    assert loaded.class_names == tuple(names) and loaded.classes == 7
    assert load(written(tmp_path)).class_names is None


def test_one_label_in_a_row_of_its_own_is_a_label_but_those_of_pixels_stay(tmp_path: Path) -> None:
    columns = load(written(tmp_path, y_train=GIVEN["y_train"][:, None], y_test=GIVEN["y_test"][:, None]))
    assert columns.digest == load(written(tmp_path)).digest
    of_pixels = load(written(tmp_path, y_train=GIVEN["x_train"], y_test=GIVEN["x_test"]))
    assert of_pixels.label_shape == (8, 7)
    np.testing.assert_array_equal(of_pixels.train_labels, GIVEN["x_train"])


@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 9)] * 3), told=st.sampled_from(["", "NHWC", "NCHW"]))
def test_channels_are_found_where_the_shape_leaves_no_doubt_and_asked_for_elsewhere(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int, int], told: str
) -> None:
    images = RANDOM.random((4, *shape), np.float32)
    arrays = {"x_train": images, "y_train": GIVEN["y_test"], "x_test": images[:2], "y_test": GIVEN["y_test"][:2]}
    path = written(tmp_path_factory.getbasetemp(), **arrays, layout=told or None)
    few = [axis for axis in (1, 3) if images.shape[axis] <= 4]
    if not told and len(few) != 1:
        with pytest.raises(BadDataError, match="N,H,W,C or N,C,H,W: add an array layout"):
            load(path)
        return
    layout = told or {1: "NCHW", 3: "NHWC"}[few[0]]
    lines: list[str] = []
    loaded = load(path, lines.append)
    expected = images.transpose(0, 2, 3, 1) if layout == "NCHW" else images
    np.testing.assert_array_equal(loaded.train_images, expected)
    np.testing.assert_array_equal(loaded.test_images, expected[:2])
    assert lines == ([] if told else [f"{path}: x_train {images.shape} is read as {','.join(layout)}"])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        *(({name: None}, f"no array {name}") for name in GIVEN),
        ({"x_train": None, "x\ntrain": GIVEN["x_train"]}, r"no array x_train: .*\['x\\ntrain'"),
        ({"x_validation": GIVEN["x_test"]}, "no array y_validation"),
        ({"y_validation": GIVEN["y_test"]}, "no array x_validation"),
        ({"y_train": np.array([{}] * 6)}, "y_train holds Python objects"),
        ({"x_train": GIVEN["x_train"].reshape(6, -1)}, r"x_train has shape \(6, 56\), but 3 or 4 dimensions"),
        ({"x_test": GIVEN["x_test"][..., None]}, r"x_test has shape \(4, 8, 7, 1\), but 3 dimensions"),
        ({"x_train": GIVEN["x_train"] / 255}, r"train: images are float64 .*\.astype\(np.float32\)"),
        ({"y_test": GIVEN["y_test"] / 1}, "test: labels are float64"),
        ({"y_test": GIVEN["y_test"][:3]}, "test: there are 4 images and 3 labels"),
        ({"y_test": GIVEN["y_test"] - 1}, "test: label number 0 is -1"),
        ({"classes": 3}, "train: label number 0 is 3; .* 0 to 2"),
        ({"classes": "four"}, "classes is 'four'"),
        ({"classes": [4, 4]}, r"classes has shape \(2,\)"),
        ({"y_train": np.zeros(6, int), "y_test": np.zeros(4, int)}, "no label is above 0, but two classes"),
        ({"class_names": np.array(["a", "b", "c"])}, "label number 0 is 3; .* 0 to 2"),
        ({"class_names": np.array(["a", "b"]), "classes": 4}, "class_names is 2 names, but a tuple of 4"),
        ({"class_names": np.array([b"a", b"b", b"c", b"d"])}, r"class_names is .S1 of shape \(4,\), but a row of text"),
        ({"class_names": np.array([["a", "b"], ["c", "d"]])}, r"class_names is .U1 of shape \(2, 2\)"),
        ({"class_names": np.array(["a", "b", "c", "\x1b[2J"])}, r"the name of class 3 is '\\x1b\[2J'"),
        ({"x_train": GIVEN["x_train"][..., None], "layout": "HWC"}, "layout is 'HWC', but one of NHWC, NCHW"),
        ({"x_train": GIVEN["x_train"][..., None], "layout": np.array([b"CHWN"])}, "layout is 'CHWN'"),
    ],
)
def test_arrays_that_make_no_data_set_are_refused_by_name(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    path = written(tmp_path, **changed)
    with pytest.raises(BadDataError, match=f"{path}.*{words}") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.npz", "none/at/all.npz", "a\0b.npz", f"{'x' * 300}.npz", "pipe.npz"])
def test_a_file_that_is_not_there_is_a_missing_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.npz")  # to open it is to wait for its writer
    with pytest.raises(MissingInputError, match="x_train, y_train, x_test, y_test"):
        data.load(name)


def whole(save: Callable[..., None]) -> bytes:
    file = io.BytesIO()
    save(file, **GIVEN)
    return file.getvalue()


PLAIN, PACKED = whole(np.savez), whole(np.savez_compressed)
DIGEST = Dataset("", *GIVEN.values(), classes=4).digest
SCRATCH = "damaged.npz"


@pytest.mark.parametrize("content", [b"", b"PK", b"x_train = 3", PACKED[:-30], PLAIN[30:], PLAIN[40:600]])
def test_what_is_no_npz_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SCRATCH).write_bytes(content)
    with pytest.raises(BadDataError, match=f"{tmp_path / SCRATCH} is not a whole .npz file"):
        load(tmp_path / SCRATCH)


@settings(max_examples=400, deadline=None)
@given(content=st.sampled_from([PLAIN, PACKED]), place=st.integers(0, len(PLAIN) - 1), bits=st.integers(1, 255))
def test_a_changed_byte_changes_nothing_or_is_bad_data(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, place: int, bits: int
) -> None:
    changed = bytearray(content)
    changed[place % len(content)] ^= bits
    path = tmp_path_factory.getbasetemp() / SCRATCH
    path.write_bytes(changed)
    try:
        assert load(path).digest == DIGEST
    except BadDataError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def with_header(folder: Path, shape: tuple[int, ...], padding: int) -> Path:
    """The small data set whose x_train declares this shape and holds 64 bytes; its header is so much longer."""
    header = io.BytesIO()
    np.lib.format.write_array_header_2_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    start, text = header.getvalue()[:8], header.getvalue()[12:] + b" " * padding
    path = written(folder, x_train=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x_train.npy", start + len(text).to_bytes(4, "little") + text + bytes(64))
    return path


def test_a_header_that_asks_for_more_than_the_file_holds_gets_no_memory(tmp_path: Path) -> None:
    path = with_header(tmp_path, (1 << 40, 8, 8), 0)

    def refused() -> None:
        with pytest.raises(BadDataError, match=f"{path}: x_train declares .* but holds 64"):
            load(path)

    assert peak_memory(refused) < 1 << 20


def test_a_header_that_is_too_long_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match=r"not a whole .npz file \(x_train: .*Header") as caught:
        load(with_header(tmp_path, (1, 8, 8), 20_000))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(900, 32, 32, 3), (900, 3, 32, 32)])
def test_a_file_needs_the_memory_of_its_arrays_and_of_one_more_while_it_is_turned(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    images, labels = np.zeros(shape, np.uint8), np.arange(900) % 10
    parts = {f"{kind}_{part}": array for part in ("train", "test") for kind, array in (("x", images), ("y", labels))}
    path = written(tmp_path, np.savez_compressed, **parts)
    load(path)  # what is compiled or imported at first
    turned = images.nbytes if shape[1] == 3 else 0
    assert peak_memory(lambda: load(path)) < 2 * images.nbytes + turned + images.nbytes // 2


def test_two_ranks_train_on_many_classes_of_floats_and_the_model_is_judged_on_the_same(tmp_path: Path) -> None:
    classes = 300
    labels = np.arange(600, dtype=np.uint16) % classes
    images = RANDOM.normal(0, 1, (600, 1, 16, 16)).astype(np.float32)
    parts = {"x_train": images[:540], "y_train": labels[:540], "x_test": images[540:], "y_test": labels[540:]}
    path = written(tmp_path, **parts, classes=classes)
    out = tmp_path / "run"
    settings = ("--model", "simpleconvnet", "--epochs", "1", "--validation", "40", "--limit-train", "510")
    trained = run(2, "-m", "distconv.train", "--device", "cpu", "--data", path, "--out", out, *settings)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("x_train (540, 1, 16, 16) is read as N,C,H,W") == 1
    start = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert (start["train_images"], start["test_images"]) == (500, 60)  # what is held out goes first
    (checkpoint,) = (out / "checkpoints").glob("*.safetensors")
    judged = run(0, "-m", "distconv.evaluate", checkpoint, "--precision", "float32", "--json")
    assert judged.returncode == 0, judged.stderr
    final = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads(judged.stdout)["correct"] == final["correct"]
