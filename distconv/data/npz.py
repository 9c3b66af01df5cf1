"""A data set in one .npz file of NumPy: x_train, y_train, x_test, y_test, named as in Keras' mnist.npz.

The file may hold x_validation and y_validation, too; `class_names`, an array of text; `classes`, a whole number (else
it is the number of these names, or the largest label + 1); and `layout`, "NHWC" or "NCHW", where the shape of x_train
does not tell which axis holds the channels.

The header of an array is held against the size of its part of the file before anything is allocated, each array is
unpacked once, and no pickled object is ever loaded.
"""

from __future__ import annotations

import errno
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from distconv.data.dataset import Dataset
from distconv.errors import BadDataError, DistconvError, MissingInputError, StorageError

NEEDED = ("x_train", "y_train", "x_test", "y_test")
VALIDATION = ("x_validation", "y_validation")
SETTINGS = ("classes", "class_names", "layout")
MOST_CHANNELS = 4  # an axis longer than that is taken for height or width
AXES = {"NHWC": (0, 1, 2, 3), "NCHW": (0, 2, 3, 1)}  # which axes of the file are N, H, W, C
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def load(path: Path, say: Callable[[str], None] = lambda line: None) -> Dataset:
    """The data set of an .npz file; say is given a line for the user where the order of the axes had to be found out.

    Raises MissingInputError, BadDataError, StorageError.
    """
    arrays = _read(path)
    parts = ["train", "test", *(["validation"] if set(VALIDATION) & set(arrays) else [])]
    axes = _axes(path, arrays, say)
    for part in parts:
        for name in (f"x_{part}", f"y_{part}"):
            if name not in arrays:
                raise BadDataError(f"{path} holds no array {name}: {', '.join(NEEDED)} are needed, or {name} goes, too")
        _check_dimensions(path, arrays, f"x_{part}", (len(axes),) if axes else (3,))
        if axes:  # in place of the array that was read, which is no longer needed
            arrays[f"x_{part}"] = np.ascontiguousarray(arrays[f"x_{part}"].transpose(axes))
        if arrays[f"y_{part}"].shape[1:] == (1,):  # as Keras' cifar10 has them
            arrays[f"y_{part}"] = arrays[f"y_{part}"][:, 0]
    return Dataset(
        str(path),
        train_images=arrays["x_train"],
        train_labels=arrays["y_train"],
        test_images=arrays["x_test"],
        test_labels=arrays["y_test"],
        classes=_classes(path, arrays, parts),
        validation_images=arrays.get("x_validation"),
        validation_labels=arrays.get("y_validation"),
        class_names=_class_names(path, arrays),
    )


def _axes(path: Path, arrays: Mapping[str, NDArray[Any]], say: Callable[[str], None]) -> tuple[int, ...]:
    """Which axes of the file's images are N, H, W, C; none where there are no channels. Raises BadDataError."""
    _check_dimensions(path, arrays, "x_train", (3, 4))
    shape = arrays["x_train"].shape
    if len(shape) == 3:
        return ()
    if "layout" in arrays:
        layout = _single(path, "layout", arrays["layout"])
        layout = layout.decode("latin-1") if isinstance(layout, bytes) else layout
        if layout not in AXES:
            raise BadDataError(f"{path}: layout is {layout!r}, but one of {', '.join(AXES)} was expected")
        return AXES[layout]
    few_first, few_last = shape[1] <= MOST_CHANNELS, shape[3] <= MOST_CHANNELS
    if few_first == few_last:
        raise BadDataError(
            f"{path}: x_train {shape} may be N,H,W,C or N,C,H,W: add an array layout to the file, 'NHWC' or 'NCHW'"
        )
    layout = "NCHW" if few_first else "NHWC"
    say(f"{path}: x_train {shape} is read as {','.join(layout)}")
    return AXES[layout]


def _check_dimensions(path: Path, arrays: Mapping[str, NDArray[Any]], name: str, possible: tuple[int, ...]) -> None:
    if arrays[name].ndim not in possible:
        expected = " or ".join(map(str, possible))
        raise BadDataError(f"{path}: {name} has shape {arrays[name].shape}, but {expected} dimensions were expected")


def _classes(path: Path, arrays: Mapping[str, NDArray[Any]], parts: list[str]) -> Any:
    """How many classes there are. What is no such number, or no label, Dataset refuses. Raises BadDataError."""
    if "classes" in arrays:
        return _single(path, "classes", arrays["classes"])
    if "class_names" in arrays:
        return arrays["class_names"].size
    labels = (arrays[f"y_{part}"] for part in parts)
    largest = max((int(array.max()) for array in labels if array.size and array.dtype.kind in "uib"), default=1)
    if largest < 1:
        raise BadDataError(
            f"{path}: no label is above {largest}, but two classes at least were expected; if there are more, say how "
            "many in an array classes"
        )
    return 1 + largest


def _class_names(path: Path, arrays: Mapping[str, NDArray[Any]]) -> tuple[str, ...] | None:
    if "class_names" not in arrays:
        return None
    names = arrays["class_names"]
    if names.dtype.kind != "U" or names.ndim != 1:
        raise BadDataError(
            f"{path}: class_names is {names.dtype} of shape {names.shape}, but a row of text was expected"
        )
    return tuple(names.tolist())


def _single(path: Path, name: str, array: NDArray[Any]) -> Any:
    if array.size != 1:
        raise BadDataError(f"{path}: {name} has shape {array.shape}, but a single value was expected")
    return array.item()


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of the file that a data set is made of, by name."""
    try:
        is_file = path.is_file()
    except OSError:  # no name that a file can have
        is_file = False
    if not is_file:
        raise MissingInputError(f"{path} is not a file: give an .npz file that holds {', '.join(NEEDED)}")
    name = "archive"  # which is read at the moment
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            there = {part.filename.removesuffix(".npy"): part for part in archive.infolist()}
            if lacking := [name for name in NEEDED if name not in there]:
                found = f"{sorted(there)}"[:200]
                raise BadDataError(f"{path} holds no array {lacking[0]}: {', '.join(NEEDED)} are needed, {found} found")
            for name in (*NEEDED, *VALIDATION, *SETTINGS):
                if name in there:
                    with archive.open(there[name]) as file:
                        if check_header(f"{path}: {name}", file, there[name].file_size).hasobject:
                            raise BadDataError(
                                f"{path}: {name} holds Python objects, which are not loaded: make it an array of "
                                "numbers"
                            )
                    with archive.open(there[name]) as file:
                        arrays[name] = npy.read_array(file, allow_pickle=False)
    except Exception as error:
        raise cannot_be_read(path, name, error) from None
    return arrays


def cannot_be_read(path: Path, name: str, error: Exception) -> DistconvError:
    """What to raise where an array of an .npz file made this error: a broken zip file can raise nearly anything."""
    if isinstance(error, DistconvError):
        return error
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # no file makes these, but a place outside of it
        return StorageError(f"{path} cannot be read: {error}")
    what = f"{name[:40]}: {' '.join(str(error).split())[:200] or type(error).__name__}"
    return BadDataError(f"{path} is not a whole .npz file ({what}): write it by np.savez")


def check_header(where: str, file: IO[bytes], size: int) -> np.dtype[Any]:
    """The dtype of an array, which may be of objects. Raises BadDataError for one of another size than is there."""
    version = npy.read_magic(file)
    if version not in HEADERS:
        raise BadDataError(f"{where} is in version {version} of NumPy's format, but 1.0 or 2.0 was expected")
    shape, _, dtype = HEADERS[version](file)
    declared, held = math.prod(shape) * dtype.itemsize, size - file.tell()
    if declared != held and not dtype.hasobject:
        raise BadDataError(f"{where} declares the shape {shape}, {declared} bytes, but holds {held}: write it again")
    return dtype
