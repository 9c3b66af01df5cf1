"""MNIST: find it, fetch it once, verify it. LeCun, Cortes, Burges, "The MNIST database of handwritten digits".

A file is trusted when the SHA-256 of its *decompressed* content is the known one, so any mirror and any compression
will do.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from distconv.data import download, idx
from distconv.data.dataset import Bytes, Dataset
from distconv.errors import BadDataError, DistconvError, DownloadError, MissingInputError

FILES = {  # name: (dimensions, SHA-256 of the decompressed file)
    "train-images-idx3-ubyte": (3, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": (1, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": (3, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": (1, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}
MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)


def load_folder(folder: Path) -> Dataset:
    """Read the four files of a folder, each plain or .gz; they may be any data set in MNIST's form.

    Raises MissingInputError, BadDataError, StorageError.
    """
    owner = {digest: file for file, (_, digest) in FILES.items()}
    arrays = []
    for file, (dimensions, _) in FILES.items():
        path = _existing(folder, file)
        if path is None:
            raise MissingInputError(
                f"{folder} holds neither {file} nor {file}.gz: all of {', '.join(FILES)} are needed"
            )
        arrays.append(idx.read(path, dimensions))
        true_name = owner.get(_idx_digest(arrays[-1]), file)
        if true_name != file:
            raise BadDataError(
                f"{folder / file} holds MNIST's {true_name}: files are swapped; give them their names back"
            )
    return Dataset(str(folder), arrays[0], arrays[1], arrays[2], arrays[3])


def find() -> Dataset | None:
    """MNIST as DISTCONV_DATA_DIR holds it, it alone if it is set, or the user's cache; None where that lacks it.

    Each file is read once and verified. Raises MissingInputError, BadDataError or StorageError where DISTCONV_DATA_DIR
    is set but does not hold MNIST.
    """
    try:
        return _read_mnist(chosen_folder())
    except DistconvError:
        if download.chosen_folder():
            raise
        return None


def cache_folder() -> Path:
    """Where downloads go."""
    return download.cache_folder("mnist")


def chosen_folder() -> Path:
    """The folder that should hold MNIST: DISTCONV_DATA_DIR, or the user's cache."""
    return download.chosen_folder() or cache_folder()


def is_complete(folder: Path) -> bool:
    """Whether all four files are there; what is in them is not read."""
    return all(_existing(folder, file) for file in FILES)


def is_in_part(folder: Path) -> bool:
    """Whether one of the files is there, of MNIST or of another set in its form."""
    try:
        return any(_existing(folder, file) for file in FILES)
    except OSError:  # no name that a file can have
        return False


def load() -> Dataset:
    """MNIST, fetched into the user's cache first if it has to be. Raises what `find` and `fetch` raise."""
    return find() or _read_mnist(fetch())


def fetch() -> Path:
    """Bring what lacks of MNIST into DISTCONV_DATA_DIR, or else the user's cache; one process at a time does that.

    Raises DownloadError where no mirror answers, MissingInputError where DISTCONV_OFFLINE=1 forbids to ask,
    CannotCreateError where the folder cannot be written, BadDataError where DISTCONV_DATA_DIR holds other files.
    """
    folder = chosen_folder()
    problems = {file: problem for file in FILES if (problem := _problem(folder, file))}
    if not problems:
        return folder
    for file, problem in problems.items():
        if download.chosen_folder() and _existing(folder, file):
            raise problem  # a user's own file is not replaced
    if download.offline():
        damaged = next((str(problem) for problem in problems.values() if isinstance(problem, BadDataError)), "")
        raise MissingInputError(
            f"{damaged or f'MNIST is not in {folder}'}; DISTCONV_OFFLINE forbids to fetch it: set DISTCONV_DATA_DIR to "
            f"a folder with {', '.join(FILES)} (plain or .gz), or use --data digits"
        )
    with download.alone_in(folder):
        for file in problems:
            if _problem(folder, file):
                _fetch(file, folder)
    return folder


def _existing(folder: Path, file: str) -> Path | None:
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.exists()), None)


def _read_mnist(folder: Path) -> Dataset:
    """MNIST from its four files. Raises what `_read_verified` raises."""
    train_images, train_labels, test_images, test_labels = (_read_verified(folder, file) for file in FILES)
    return Dataset("mnist", train_images, train_labels, test_images, test_labels)


def _read_verified(folder: Path, file: str) -> Bytes:
    """The array of one of MNIST's files. Raises MissingInputError, StorageError, BadDataError for another content."""
    dimensions, known = FILES[file]
    path = _existing(folder, file)
    if path is None:
        raise MissingInputError(
            f"{folder} holds neither {file} nor {file}.gz: DISTCONV_DATA_DIR must be a folder with MNIST's four files"
        )
    array = idx.read(path, dimensions)
    if (digest := _idx_digest(array)) != known:
        raise BadDataError(
            f"{path} is not MNIST's: its content has SHA-256 {digest}, expected {known}; "
            "fetch it again, or name its folder by --data to use another data set"
        )
    return array


def _problem(folder: Path, file: str) -> DistconvError | None:
    """What keeps the file of a folder from being MNIST's, or None."""
    try:
        _read_verified(folder, file)
    except DistconvError as error:
        return error
    return None


def _idx_digest(array: Bytes) -> str:
    """SHA-256 of the decompressed IDX file that holds this array."""
    header = bytes([0, 0, idx.UNSIGNED_BYTE, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    sha = hashlib.sha256(header)
    sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def _fetch(file: str, folder: Path) -> None:
    """Bring one file into the folder; it gets its name when it is verified. Raises DownloadError."""

    def keep(got: Path) -> None:
        _read_verified(got.parent, file)
        got.replace(folder / got.name)
        (folder / file).unlink(missing_ok=True)  # a damaged one would be found first

    if failures := download.from_first([f"{mirror}{file}.gz" for mirror in MIRRORS], folder, keep):
        raise DownloadError(
            f"MNIST could not be fetched ({failures}): copy {', '.join(FILES)} (plain or .gz) "
            f"into {folder}, or name their folder by DISTCONV_DATA_DIR, or train with --data digits"
        )
