"""Files of tensors: safetensors' own format, without copies of what lies in memory or on disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from distconv.run import tensorfile
from distconv.run.tensorfile import TensorFile, write_tensors

TENSORS = {
    "value/conv1.W": np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32),
    "empty": np.zeros((0, 4), np.float32),
    'odd "name" \u00fc': np.float64([-0.0, np.inf, np.nan, 5e-324]),
    "scalar": np.array(7, np.float32),
}
ABOUT = {"distconv": '{"a": "\u00fc"}', "sha256": "0" * 64}


@pytest.fixture(autouse=True, params=[1, 4, 1000])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "PIECE", request.param)


def written(folder: Path) -> Path:
    path = folder / "ours"
    with path.open("wb") as file:
        write_tensors(file, TENSORS, ABOUT)
    return path


def assert_equal(found: dict[str, np.ndarray]) -> None:
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found[name], tensor, strict=True)


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    assert_equal(load_file(written(tmp_path)))
    with safe_open(written(tmp_path), framework="numpy") as file:
        assert file.metadata() == ABOUT


@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_what_either_has_written_is_read(tmp_path: Path, writer: str) -> None:
    path = written(tmp_path)
    if writer == "theirs":
        save_file(TENSORS, path, ABOUT)
    file = TensorFile(path)
    assert file.metadata == ABOUT and file.shapes == {name: tensor.shape for name, tensor in TENSORS.items()}
    assert_equal(dict(file))


def test_a_file_that_was_changed_or_replaced_since_it_was_opened_is_not_read(tmp_path: Path) -> None:
    file = TensorFile(written(tmp_path))
    os.utime(file.path, (1, 1))
    with pytest.raises(OSError, match="another file"):
        file["scalar"]
    file = TensorFile(written(tmp_path))
    written(tmp_path).with_name("new").write_bytes(file.path.read_bytes())
    (tmp_path / "new").replace(file.path)
    with pytest.raises(OSError, match="another file"):
        file["scalar"]


def test_numbers_of_another_kind_are_refused(tmp_path: Path) -> None:
    save_file({"halves": np.ones(3, np.float16)}, tmp_path / "halves")
    with pytest.raises(ValueError, match="F16"):
        TensorFile(tmp_path / "halves")
