"""The two forms of CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html), and of other sets of colours of 32 x 32.

Binary: a record for each image, a byte with its label and 3 x 32 x 32 with its planes of red, green and blue. Python:
pickles of the same, of which nothing is run. Five files are for training and one is for test, and another one names the
classes. They lie in a folder, or in a .tar.gz, of which nothing is unpacked to the disk.
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np

from distconv.data import unpickler
from distconv.data.dataset import Bytes
from distconv.errors import BadDataError, DistconvError, MissingInputError, StorageError

SIDE, CHANNELS = 32, 3
RECORD = 1 + CHANNELS * SIDE * SIDE
TRAIN = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")
TEST = "test_batch"
LARGEST = 1 << 30  # bytes of a file, and of all that an archive unpacks to; six times CIFAR-10
MOST_INSTRUCTIONS = 1_000_000  # of a pickle; 10,000 images with their file names take 30,000


@dataclass(frozen=True)
class Form:
    """ending: of the files' names; meta: the file with the names of the classes; folder, archive: as they are official.

    records: (where, content of a file) -> (N, 3073). class_names: the same of meta -> names. Both raise BadDataError.
    """

    ending: str
    meta: str
    folder: str
    archive: str
    records: Callable[[str, bytes], Bytes]
    class_names: Callable[[str, bytes], tuple[str, ...]]

    @property
    def files(self) -> list[str]:
        return [*(f"{batch}{self.ending}" for batch in (*TRAIN, TEST)), self.meta]


def locate(path: Path) -> Path | None:
    """The folder or archive in one of the forms that a path leads to: itself, or one within it; None if there is none.

    One file of a form is enough, so that what else is needed can be named.
    """
    try:
        if path.is_file():
            return path if path.name.endswith((".tar.gz", ".tgz")) else None
        if folder := next((path / form.folder for form in FORMS if (path / form.folder).exists()), None):
            return folder
        if any((path / file).exists() for form in FORMS for file in form.files):
            return path
        return next((path / form.archive for form in FORMS if (path / form.archive).exists()), None)
    except OSError:  # no name that a file can have
        return None


def read(place: Path) -> tuple[str, tuple[str, ...], Iterator[tuple[str, str, Bytes]]]:
    """What a folder or an archive holds that `locate` gave: the file with the names of the classes, these names, and of
    each batch its file, its name of TRAIN and TEST, and its records (N, 3073), which are read when they are asked for.

    Raises MissingInputError, BadDataError, StorageError.
    """
    unpacked = unpack(place) if place.is_file() else None

    def has(file: str) -> bool:
        return (place / file).exists() if unpacked is None else file in unpacked

    def content(file: str) -> tuple[str, bytes]:
        if unpacked is None:
            return str(place / file), _content(place / file)
        return f"{place}: {file}", unpacked.pop(file)

    form = next((form for form in FORMS if any(map(has, form.files))), BINARY)
    if lacking := [file for file in form.files if not has(file)]:
        raise MissingInputError(
            f"{place} holds no {lacking[0]}: all of {', '.join(form.files)} are needed; unpack the archive again"
        )
    where, names = content(form.meta)

    def batches() -> Iterator[tuple[str, str, Bytes]]:
        for batch in (*TRAIN, TEST):
            where, packed = content(f"{batch}{form.ending}")
            yield where, batch, form.records(where, packed)

    return where, form.class_names(where, names), batches()


def images_and_labels(parts: list[Bytes]) -> tuple[Bytes, Bytes]:
    """(N, 32, 32, 3) and (N,) from records (n, 3073), whose list is emptied, as memory holds all of them."""
    labels = np.concatenate([records[:, 0] for records in parts])
    images = np.empty((len(labels), SIDE, SIDE, CHANNELS), np.uint8)
    end = len(labels)
    while parts:
        planes = parts.pop()[:, 1:].reshape(-1, CHANNELS, SIDE, SIDE)
        images[end - len(planes) : end] = planes.transpose(0, 2, 3, 1)
        end -= len(planes)
    return images, labels


def _content(path: Path) -> bytes:
    if not path.is_file():  # to open a pipe is to wait for its writer
        raise MissingInputError(f"{path} is not a regular file: unpack the archive again")
    try:
        if path.stat().st_size > LARGEST:
            raise BadDataError(f"{path} has {path.stat().st_size:,} bytes; at most {LARGEST:,} are read")
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from None


class _Bounded:
    """A file of which no more is read than LARGEST, however small it was before it was unpacked."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file, self.left = path, file, LARGEST

    def read(self, size: int) -> bytes:
        content: bytes = self.file.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise BadDataError(f"{self.path} unpacks to more than {LARGEST:,} bytes: it is not CIFAR-10's")
        return content


def unpack(path: Path) -> dict[str, bytes]:
    """The files of an archive that belong to the forms, in memory, by name, whatever folder of it they lie in.

    Raises BadDataError for a damaged archive, and where such a name is a link or comes twice; StorageError.
    """
    wanted = {file for form in FORMS for file in form.files}
    files: dict[str, bytes] = {}
    try:
        with gzip.open(path) as packed:
            bounded = _Bounded(path, packed)
            with tarfile.open(fileobj=cast(Any, bounded), mode="r|") as archive:
                for member in archive:
                    name = PurePosixPath(member.name).name
                    file = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                    if name in wanted and (file is None or name in files):
                        what = "comes twice" if file else "is no plain file"
                        raise BadDataError(f"{path}: {member.name[:200]!r} {what}: fetch the archive again")
                    if name in wanted and file:
                        files[name] = file.read()
            while bounded.read(1 << 16):  # to the end, where the checksum is
                pass
    except DistconvError:
        raise
    except Exception as error:  # a broken archive can raise nearly anything
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise StorageError(f"{path} cannot be read: {error}") from None
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadDataError(f"{path} is not a whole .tar.gz archive ({what}): fetch it again") from None
    return files


def _binary_records(where: str, content: bytes) -> Bytes:
    if len(content) % RECORD:
        raise BadDataError(
            f"{where} has {len(content):,} bytes, but records of {RECORD:,} were expected: unpack the archive again"
        )
    return np.frombuffer(content, np.uint8).reshape(-1, RECORD)


def _binary_class_names(where: str, content: bytes) -> tuple[str, ...]:
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError:
        raise BadDataError(f"{where} is no text, but a line with the name of each class was expected") from None
    return tuple(line.strip() for line in lines if line.strip())


def _python_records(where: str, content: bytes) -> Bytes:
    batch = _unpickled(where, content)
    data, labels = batch.get("data"), batch.get("labels")
    images = data.array if isinstance(data, unpickler.PickledArray) else None
    if images is None or images.dtype != np.uint8 or images.shape[1:] != (RECORD - 1,):
        raise BadDataError(f"{where}: data is no array of bytes of shape (N, {RECORD - 1:,}), which was expected")
    N = len(images)
    if not isinstance(labels, list) or len(labels) != N or not all(type(n) is int and 0 <= n < 256 for n in labels):
        raise BadDataError(f"{where}: labels is no list of {N:,} numbers from 0, one for each image of data")
    records = np.empty((N, RECORD), np.uint8)
    records[:, 0], records[:, 1:] = labels, images
    return records


def _python_class_names(where: str, content: bytes) -> tuple[str, ...]:
    names = _unpickled(where, content).get("label_names")
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
        raise BadDataError(f"{where}: label_names is no list of names of classes, which was expected")
    return tuple(unpickler.as_text(name) for name in names)


def _unpickled(where: str, content: bytes) -> Mapping[Any, Any]:
    """The dict of a pickle; its keys, which Python 2 wrote as bytes, are text. Raises BadDataError."""
    try:
        found = unpickler.load(content, MOST_INSTRUCTIONS)
    except Exception as error:  # a broken pickle can raise nearly anything
        raise BadDataError(f"{where} is no pickle of a batch: {str(error)[:200]}; nothing of it was run") from None
    if not isinstance(found, dict):
        raise BadDataError(f"{where} holds a {type(found).__name__}, but a dict with data and labels was expected")
    return {unpickler.as_text(name): value for name, value in found.items()}


BINARY = Form(
    ".bin", "batches.meta.txt", "cifar-10-batches-bin", "cifar-10-binary.tar.gz", _binary_records, _binary_class_names
)
PYTHON = Form("", "batches.meta", "cifar-10-batches-py", "cifar-10-python.tar.gz", _python_records, _python_class_names)
FORMS = (BINARY, PYTHON)
