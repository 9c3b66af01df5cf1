"""Files that are no checkpoint: .npz files are read to the bit, others are told for what they are."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import save_file

from distconv import data
from distconv.errors import BadDataError, DistconvError, MissingInputError, StorageError
from distconv.run.array_files import empty_folder, read_arrays, require_file
from distconv.run.loading import newest_of, open_file
from tests.files import peak_memory

MIB = 1 << 20


def zipped(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"{}")
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_to_the_bit_and_runs_nothing(tmp_path: Path, save: object) -> None:
    draw = np.random.default_rng(0).standard_normal
    arrays = {"W1": draw((3, 2, 5, 5)), "b1": draw(3).astype("f4"), "W2": draw((4, 3)).T, "b2": draw(4).astype(">f8")}
    others = {"epoch": np.array(3), "note": np.array("text"), "state": np.array([{"W1": 1}], dtype=object)}
    path = tmp_path / "params"  # its name does not matter
    with path.open("wb") as file:
        save(file, **arrays, **others)  # type: ignore[operator]
    found = read_arrays(path)
    assert list(found) == [*arrays, *others] and all(found[name] is None for name in others)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_a_pickle_is_one_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    path.write_bytes(pickle.dumps({"W1": np.ones(2)}))
    np.testing.assert_array_equal(read_arrays(path)["W1"], np.ones(2))  # type: ignore[arg-type]


def test_an_npz_gets_no_memory_for_what_it_only_declares(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    np.savez(path, W1=np.zeros(10))
    content = path.read_bytes()
    header = content[content.index(b"\x93NUMPY") :][: 128 + 80]  # and its numbers; a checksum stands for both, twice
    longer = header.replace(b"(10,), }" + b" " * 8, b"(1000000000,), }")
    assert longer != header and len(longer) == len(header)
    content = content.replace(header, longer)
    old, new = (struct.pack("<I", zlib.crc32(part)) for part in (header, longer))
    path.write_bytes(content.replace(old, new))

    def refused() -> None:
        with pytest.raises(BadDataError, match=r"params\.npz.*declares the shape"):
            read_arrays(path)

    assert peak_memory(refused) < 4 * MIB


OTHERS = {
    "cat.png": (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    "model.h5": (b"\x89HDF\r\n\x1a\n", "Keras"),
    "model.onnx": (b"\x08\x07\x12\x07pytorch", "ONNX"),
    "model.pt": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02", "PyTorch"),
    "x.npy": (b"\x93NUMPY\x01\x00", "a single array"),
    "notes.txt": (b"Dear diary", "nor a pickle of arrays"),
    "empty.pkl": (b"", "nor a pickle of arrays"),
}
ARCHIVES = {
    "new.pt": (("new/data.pkl", "new/data/0"), "PyTorch"),
    "model.keras": (("metadata.json", "config.json", "model.weights.h5"), "Keras"),
    "mnist.npz": (("x_train.npy", "y_train.npy", "x_test.npy", "y_test.npy"), "a data set, which --data takes"),
    "letters.zip": (("a.txt",), "a zip archive of other files"),
    "nothing.zip": ((), "a zip archive of other files"),
}


@pytest.mark.parametrize("name", [*OTHERS, *ARCHIVES])
def test_another_programs_file_is_told_for_what_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name in ARCHIVES:
        names, words = ARCHIVES[name]
        zipped(path, *names)
    else:
        content, words = OTHERS[name]
        path.write_bytes(content)
    with pytest.raises(BadDataError, match=f"{path} is .*{words}") as caught:
        read_arrays(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert ("numpy.savez" in sentence) == any(word in words for word in ("PyTorch", "Keras", "ONNX", "single"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_another_programs_safetensors_file_is_not_called_a_damaged_checkpoint(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"layer.weight": np.ones((2, 3), dtype)}, path, {"format": "pt"})
    with pytest.raises(BadDataError, match=f"{path} is a safetensors file of another program.*numpy.savez"):
        open_file(path, None)


@pytest.mark.parametrize("length", [10, 100, -30])
def test_a_part_of_an_npz_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "params.npz"
    np.savez(path, W1=np.ones(100))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BadDataError, match=r"params\.npz is not a whole \.npz file"):
        read_arrays(path)


def test_npz_files_with_bytes_changed_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    np.savez(path, W1=np.ones((2, 3)), b1=np.zeros(2, np.float32))
    whole, random = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for place in random.integers(0, len(content), 3):
            content[place] = random.integers(0, 256)
        path.write_bytes(content)
        try:
            read_arrays(path)
        except DistconvError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 200  # a checksum stands for each array


def test_a_name_much_like_one_that_is_there_was_perhaps_meant(tmp_path: Path) -> None:
    (tmp_path / "params.pkl").touch()
    for given, words in (
        ("parms.pkl", rf"does not exist: .*\(did you mean {tmp_path / 'params.pkl'}\?\)$"),
        ("qqqq", r"qqqq does not exist: .* was expected$"),
        ("none/params.pkl", f"there is no folder {tmp_path / 'none'}$"),
        ("x" * 300, "x does not exist"),
        ("a\0b", "does not exist"),
        (".", "is not a file"),
    ):
        with pytest.raises(MissingInputError, match=words):
            require_file(tmp_path / given)


def test_a_folder_that_may_not_be_read_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "glob", mock.Mock(side_effect=PermissionError(13, "Permission denied")))  # root may all
    with pytest.raises(StorageError, match=f"{tmp_path} cannot be read: .*Permission denied"):
        newest_of(tmp_path, print)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(MissingInputError, match=f"{tmp_path} is a folder that may not be read"):
        data.load(str(tmp_path))


def test_a_folder_without_a_checkpoint_says_what_it_holds(tmp_path: Path) -> None:
    assert str(empty_folder(tmp_path)).endswith("the folder of a run was expected")
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    assert f"(did you mean {tmp_path / 'mine'}?)" in str(empty_folder(tmp_path / "mine" / "checkpoints"))
    (tmp_path / "params.npz").touch()
    assert "it holds 'mine', 'params.npz': give one of them" in str(empty_folder(tmp_path))
    (tmp_path / "mine" / ".distconv-lock").touch()
    assert "its run has saved none yet" in str(empty_folder(tmp_path / "mine"))


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl"])
def test_a_file_of_a_run_names_the_run(tmp_path: Path, name: str) -> None:
    for file in ("config.toml", "metrics.jsonl"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(BadDataError, match=rf"{name} is a file of .*\(did you mean {tmp_path}\?\)$"):
        read_arrays(tmp_path / name)
