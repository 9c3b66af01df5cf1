"""How a data set comes to this machine: once, by one process, from the first mirror that gives it whole."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import platformdirs

from distconv.errors import CannotCreateError, DistconvError, DownloadError

SECONDS_TO_FIRST_BYTE = 4.0  # a mirror; two of them stay below the ten seconds that a user should wait for nothing
SECONDS_BETWEEN_BYTES = 20.0
LOCK_SECONDS = 900.0


def chosen_folder() -> Path | None:
    """Where the user says that data sets are, by DISTCONV_DATA_DIR."""
    chosen = os.environ.get("DISTCONV_DATA_DIR")
    return Path(chosen) if chosen else None


def cache_folder(name: str) -> Path:
    """Where a data set of that name goes else: distconv/NAME in the user's cache folder."""
    return Path(platformdirs.user_cache_dir("distconv")) / name


def offline() -> bool:
    """Whether DISTCONV_OFFLINE forbids to open a connection."""
    return os.environ.get("DISTCONV_OFFLINE", "") not in ("", "0")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make the folder, and wait until no other process brings something into it.

    Raises DownloadError where one does for too long, CannotCreateError where the folder cannot be written.
    """
    import filelock  # slow to import, seldom needed

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / "lock", timeout=LOCK_SECONDS):
            yield
    except filelock.Timeout:
        raise DownloadError(f"another process has held {folder / 'lock'} for {LOCK_SECONDS:.0f} s: end it") from None
    except OSError as error:
        raise CannotCreateError(
            f"{folder} cannot be written ({error}): set XDG_CACHE_HOME or DISTCONV_DATA_DIR"
        ) from None


def from_first(urls: Sequence[str], folder: Path, keep: Callable[[Path], None]) -> str:
    """Download from the first of these that gives what `keep` takes -> "", or what was wrong with each.

    keep is given a file in a passing folder within `folder`, under the last part of its url. It verifies it and moves
    what it needs to its place, or raises a DistconvError.
    """
    failures = []
    for url in urls:
        mirror, _, name = url.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=folder, ignore_cleanup_errors=True) as temporary:
            failure = _download(url, Path(temporary), name)
            try:
                if not failure:
                    keep(Path(temporary) / name)
                    return ""
            except DistconvError as error:
                failure = str(error)
            failures.append(f"{mirror}/: {failure}")
    return "; ".join(failures) or "no mirror is known"


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
