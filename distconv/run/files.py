"""Files that are written whole or not at all: a kill, or a full disk, leaves what was there before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from distconv.errors import StorageError


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all. Raises StorageError."""
    write_whole(path, text.encode())


def as_bytes(text: str) -> bytes:
    """As UTF-8, but for what of a path is none, or of a locale without it: those bytes stay as they are on disk."""
    return text.encode(errors="surrogateescape")


def write_whole(path: Path, content: bytes, writer: str = "") -> None:
    """Write a file, whole or not at all. writer: see replacing. Raises StorageError."""
    try:
        with replacing(path, writer) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def replacing(path: Path, writer: str = "") -> Iterator[Path]:
    """The name of a new file, which takes the place of another at the end, or is removed where anything is raised.

    writer: tells several apart that write the same file at once. Else the name is fixed, so that what a kill leaves
    there is overwritten. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}{writer}.tmp")  # not the name of a file that a user would have
    try:
        temporary.unlink(missing_ok=True)  # it may be a link to a file of somebody's
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # a part of a file would only fill the disk
            temporary.unlink(missing_ok=True)
        raise
