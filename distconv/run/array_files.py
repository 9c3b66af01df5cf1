"""Arrays by name from a file that is no checkpoint: the source's pickle, or an .npz of NumPy.

What a file is, its first bytes say, whatever its name is. Of other programs' files, and of paths that lead nowhere, a
sentence says what they are and what to do.
"""

from __future__ import annotations

import difflib
import zipfile
from pathlib import Path

from numpy.lib import format as npy

from distconv.data.npz import NEEDED, cannot_be_read, check_header
from distconv.errors import BadDataError, MissingInputError, StorageError
from distconv.kernels.interface import Array
from distconv.run.layout import FileArrays, listed
from distconv.run.pickled import read_pickle

LARGEST = 1 << 30  # bytes of a file, and of what it unpacks to
EXPECTED = "a run's folder, a checkpoint (.safetensors), or a pickle or .npz of arrays W1, b1, ... was expected"
AS_NPZ = "save its arrays by numpy.savez('params.npz', W1=..., b1=...), laid out as distconv.export --help says"
ZIP = (b"PK\x03\x04", b"PK\x05\x06")
OTHERS = {  # what a file is, by its first bytes
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes it (.h5)",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "a checkpoint of PyTorch, in its older form",
    b"\x93NUMPY": "a single array of NumPy (.npy)",
    b"\x1f\x8b": "a gzip file",
}
WITH_WEIGHTS = ("PyTorch", "Keras", "ONNX", "TensorFlow", ".npy", "safetensors")
BY_ENDING = {  # what has no magic
    ".onnx": "an ONNX model",
    ".tflite": "a TensorFlow Lite model",
    ".pb": "a TensorFlow graph",
    ".toml": "a file of settings",
    ".jsonl": "a file of records",
}


def read_arrays(path: Path) -> FileArrays:
    """What a file holds, by name; None for what is no array of floats. Nothing that a file names is run.

    Raises StorageError, and BadDataError for what is neither a pickle nor an .npz.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise BadDataError(f"{path} has {path.stat().st_size:,} bytes; at most {LARGEST:,} are read")
        with path.open("rb") as file:
            head = file.read(32)
        if head.startswith(ZIP):
            return _read_zip(path)
        for magic, what in OTHERS.items():
            if head.startswith(magic):
                raise not_ours(path, what)
        if path.suffix in BY_ENDING:
            raise not_ours(path, BY_ENDING[path.suffix], meant(path))
        return read_pickle(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from None


def not_ours(path: Path, what: str, hint: str = "") -> BadDataError:
    """What to say of a file that is no model, or another program's."""
    advice = f": {AS_NPZ}" if any(word in what for word in WITH_WEIGHTS) else hint
    return BadDataError(f"{path} is {what}, but {EXPECTED}{advice}")


def require_file(path: Path) -> None:
    """Raise MissingInputError for a path that is no file, with the names nearby that may have been meant."""
    try:
        if path.is_file():
            return
        there = path.exists()
    except (OSError, ValueError):  # in a folder that may not be entered, or no name that a file can have
        there = False
    found = "is not a file" if there else "does not exist"
    raise MissingInputError(f"{path} {found}: {EXPECTED}{'' if there else meant(path)}")


def empty_folder(folder: Path) -> MissingInputError:
    """What to say of a folder that is not a run's, or has no checkpoint yet: whether one nearby may have been meant."""
    of_run = (folder / "metrics.jsonl").exists() or (folder / ".distconv-lock").exists()
    advice = "; its run has saved none yet" if of_run else meant(folder)
    return MissingInputError(
        f"{folder} holds no checkpoints/step-*.safetensors: the folder of a run was expected{advice}"
    )


def meant(path: Path) -> str:
    """The end of a sentence about a path that is no run or model: what else may have been meant; or nothing.

    The run that it lies in, the runs and models that it holds, or names much like it in the same folder.
    """
    try:
        if path.name == "checkpoints" or (path.exists() and (path.parent / "metrics.jsonl").exists()):
            return f" (did you mean {path.parent}?)"
        if path.is_dir():
            models = sorted(other.name for other in path.iterdir() if _may_be_a_model(other))
            return f"; it holds {listed(models)}: give one of them" if models else ""
        if not path.parent.is_dir():
            return f"; there is no folder {path.parent}"
        close = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=2, cutoff=0.7)
    except (OSError, ValueError):
        return ""
    close = [name for name in close if name != path.name]  # a file of that name is there, but is none
    return f" (did you mean {' or '.join(str(path.with_name(name)) for name in close)}?)" if close else ""


def _may_be_a_model(path: Path) -> bool:
    return (path / "checkpoints").is_dir() or path.suffix in (".safetensors", ".npz", ".pkl", ".pickle")


def _read_zip(path: Path) -> FileArrays:
    """The arrays of an .npz file. Raises BadDataError, StorageError."""
    name = "archive"  # which is read at the moment
    arrays: dict[str, Array | None] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            names = [part.filename for part in parts]
            if what := _kind_of_zip(names):
                raise not_ours(path, what)
            if sum(part.file_size for part in parts) > LARGEST:
                raise BadDataError(f"{path} unpacks to more than {LARGEST:,} bytes, and no more are read")
            for part in parts:
                name = part.filename.removesuffix(".npy")
                with archive.open(part) as file:
                    dtype = check_header(f"{path}: {name[:40]!r}", file, part.file_size)
                arrays[name] = None
                if dtype.kind == "f" and dtype.itemsize <= 8:
                    with archive.open(part) as file:
                        arrays[name] = npy.read_array(file, allow_pickle=False)
    except Exception as error:
        raise cannot_be_read(path, name, error) from None
    return arrays


def _kind_of_zip(names: list[str]) -> str:
    """What a zip archive is that is no .npz of parameters; nothing of one that may be."""
    if set(NEEDED) <= {name.removesuffix(".npy") for name in names}:
        return "a data set, which --data takes"
    if any(name.endswith(("/data.pkl", "constants.pkl")) for name in names):
        return "a checkpoint of PyTorch"
    if {"config.json", "model.weights.h5"} & set(names):
        return "a Keras model (.keras)"
    return "" if names and all(name.endswith(".npy") for name in names) else "a zip archive of other files than arrays"
