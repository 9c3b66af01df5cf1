"""A safetensors file, written and read in pieces, so that no copy of a large model ever lies in memory."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

Array = NDArray[Any]
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}  # by their names in the format
PIECE = 1 << 18  # numbers
LARGEST_HEADER = 4 << 20  # bytes: that of 10,000 tensors is shorter


def write_tensors(file: IO[bytes], tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors of float32 or float64 as they lie in memory: what safetensors.numpy.save would give."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    names = {dtype: name for name, dtype in DTYPES.items()}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin where 8 bytes do
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        file.write(tensor.data)


class OtherProgramsFileError(Exception):
    """A whole safetensors file whose metadata lack what ours have."""


class TensorFile(Mapping[str, Array]):
    """What a file holds: its metadata, and its tensors by name, each read when it is asked for.

    shapes: of the tensors, by name. wanted: a name that must be in the metadata. Raises OSError, OtherProgramsFileError
    where it is not, and whatever safetensors raises for a file that is none.
    """

    def __init__(self, path: Path, wanted: str = "") -> None:
        with path.open("rb") as raw:
            if int.from_bytes(raw.read(8), "little") > LARGEST_HEADER:
                raise ValueError("its header is too long")
        with safe_open(path, framework="numpy") as checked:  # the tensors fill the file, none lies on another
            self.metadata: Mapping[str, str] = checked.metadata() or {}
        if wanted and wanted not in self.metadata:
            raise OtherProgramsFileError
        with path.open("rb") as file:
            self.path, self.identity = path, _identity(file)
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        if odd := sorted({about["dtype"] for about in header.values()} - DTYPES.keys()):
            raise ValueError(f"it holds numbers of the kind {odd[0]}")
        self.shapes = {name: tuple(about["shape"]) for name, about in header.items()}
        self.dtypes = {name: DTYPES[about["dtype"]] for name, about in header.items()}
        self.starts = {name: 8 + length + about["data_offsets"][0] for name, about in header.items()}

    def pieces(self, names: Iterable[str]) -> Iterator[tuple[str, int, Array]]:
        """The numbers of these tensors in order: a name, the index of a piece's first number, the piece (n,).

        A tensor without numbers has one piece without any. Raises OSError, also where another file is there by now.
        """
        with self.path.open("rb") as file:
            if _identity(file) != self.identity:
                raise OSError("another file has taken its place")
            for name in names:
                dtype, size = self.dtypes[name], math.prod(self.shapes[name])
                file.seek(self.starts[name])
                for start in range(0, max(size, 1), PIECE):
                    piece = np.empty(min(PIECE, size - start), dtype)
                    if file.readinto(piece.data) != piece.nbytes:
                        raise OSError("it has become shorter")
                    yield name, start, piece

    def __getitem__(self, name: str) -> Array:
        return np.concatenate([piece for _, _, piece in self.pieces([name])]).reshape(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _identity(file: IO[bytes]) -> tuple[int, ...]:
    """What tells an open file from another one, and from itself once it has been written to."""
    about = os.fstat(file.fileno())
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns
