"""MNIST: find it, fetch it once, verify it. LeCun, Cortes, Burges, "The MNIST database of handwritten digits".

A file is trusted when the SHA-256 of its *decompressed* content is the known one, so any mirror and any compression
will do.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from distconv.data import idx
from distconv.data.dataset import Bytes, Dataset
from distconv.errors import BadDataError, CannotCreateError, DistconvError, DownloadError, MissingInputError

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
SECONDS_TO_FIRST_BYTE = 4.0  # a mirror; two of them stay below the ten seconds that a user should wait for nothing
SECONDS_BETWEEN_BYTES = 20.0
LOCK_SECONDS = 900.0


def load_folder(folder: Path) -> Dataset:
    """Read the four files of a folder, each plain or .gz; they may be any data set in MNIST's form.

    Raises MissingInputError, BadDataError, StorageError.
    """
    try:
        is_folder = folder.is_dir()
    except OSError:  # no name that a file can have
        is_folder = False
    if not is_folder:
        raise MissingInputError(f"{folder} is not a folder: give one that holds {', '.join(FILES)}, plain or .gz")
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
        if os.environ.get("DISTCONV_DATA_DIR"):
            raise
        return None


def cache_folder() -> Path:
    """Where downloads go: distconv/mnist in the user's cache folder."""
    return Path(platformdirs.user_cache_dir("distconv")) / "mnist"


def chosen_folder() -> Path:
    """The folder that should hold MNIST: DISTCONV_DATA_DIR, or the user's cache."""
    chosen = os.environ.get("DISTCONV_DATA_DIR")
    return Path(chosen) if chosen else cache_folder()


def is_complete(folder: Path) -> bool:
    """Whether all four files are there; what is in them is not read."""
    return all(_existing(folder, file) for file in FILES)


def offline() -> bool:
    """Whether DISTCONV_OFFLINE forbids to open a connection."""
    return os.environ.get("DISTCONV_OFFLINE", "") not in ("", "0")


def load() -> Dataset:
    """MNIST, fetched into the user's cache first if it has to be. Raises what `find` and `fetch` raise."""
    return find() or _read_mnist(fetch())


def fetch() -> Path:
    """Bring what lacks of MNIST into DISTCONV_DATA_DIR, or else the user's cache; one process at a time does that.

    Raises DownloadError where no mirror answers, MissingInputError where DISTCONV_OFFLINE=1 forbids to ask,
    CannotCreateError where the folder cannot be written, BadDataError where DISTCONV_DATA_DIR holds other files.
    """
    chosen, folder = os.environ.get("DISTCONV_DATA_DIR"), chosen_folder()
    problems = {file: problem for file in FILES if (problem := _problem(folder, file))}
    if not problems:
        return folder
    for file, problem in problems.items():
        if chosen and _existing(folder, file):
            raise problem  # a user's own file is not replaced
    if offline():
        damaged = next((str(problem) for problem in problems.values() if isinstance(problem, BadDataError)), "")
        raise MissingInputError(
            f"{damaged or f'MNIST is not in {folder}'}; DISTCONV_OFFLINE forbids to fetch it: set DISTCONV_DATA_DIR to "
            f"a folder with {', '.join(FILES)} (plain or .gz), or use --data digits"
        )
    import filelock  # slow to import, seldom needed

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / "lock", timeout=LOCK_SECONDS):
            for file in problems:
                if _problem(folder, file):
                    _fetch(file, folder)
    except filelock.Timeout:
        raise DownloadError(f"another process has held {folder / 'lock'} for {LOCK_SECONDS:.0f} s: end it") from None
    except OSError as error:
        raise CannotCreateError(
            f"{folder} cannot be written ({error}): set XDG_CACHE_HOME or DISTCONV_DATA_DIR"
        ) from None
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


def _fetch(file: str, cache: Path) -> None:
    """Bring one file into the cache from the first mirror that gives it whole; it gets its name when verified."""
    failures = []
    for mirror in MIRRORS:
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=cache, ignore_cleanup_errors=True) as temporary:
            failure = _download(f"{mirror}{file}.gz", Path(temporary), f"{file}.gz")
            problem = failure or _problem(Path(temporary), file)
            if problem is None:
                (Path(temporary) / f"{file}.gz").replace(cache / f"{file}.gz")
                (cache / file).unlink(missing_ok=True)  # a damaged one would be found first
                return
            failures.append(f"{mirror}: {problem}")
    raise DownloadError(
        f"MNIST could not be fetched ({'; '.join(failures)}): copy {', '.join(FILES)} (plain or .gz) "
        f"into {cache}, or name their folder by DISTCONV_DATA_DIR, or train with --data digits"
    )


def _download(url: str, folder: Path, name: str) -> str | None:
    """Download url to folder / name with a progress bar. Returns what went wrong, if anything.

    The work is done in a thread that is left behind when no byte comes in time: name look-up and connection attempts
    have no time limit of their own that could be trusted.
    """
    import pooch  # slow to import, seldom needed

    pooch.get_logger().setLevel(logging.ERROR)
    progress = _Progress(name)
    outcome: list[str] = []

    def work() -> None:
        downloader = pooch.HTTPDownloader(progressbar=progress, timeout=(SECONDS_TO_FIRST_BYTE, SECONDS_BETWEEN_BYTES))
        try:
            pooch.retrieve(url, known_hash=None, fname=name, path=folder, downloader=downloader)
        except Exception as error:  # whatever it was: the next mirror may do better
            outcome.append(f"{type(error).__name__}")
        progress.started.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    if not progress.started.wait(SECONDS_TO_FIRST_BYTE):
        return f"no answer within {SECONDS_TO_FIRST_BYTE:.0f} s"
    thread.join()
    return outcome[0] if outcome else None


class _Progress:
    """tqdm as pooch wants it, shown on a terminal only, that also tells when the first bytes have come."""

    def __init__(self, name: str) -> None:
        self.started = threading.Event()
        self.name = name
        self.total = 0
        self.bar: Any = None

    def update(self, count: int) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(desc=self.name, total=self.total, unit="B", unit_scale=True, disable=None)
        self.started.set()
        self.bar.update(count)

    def reset(self) -> None:
        """pooch resets the bar at the end to show it full."""
        if self.bar is not None:
            self.bar.reset()

    def close(self) -> None:
        with contextlib.suppress(AttributeError):
            self.bar.close()
