"""Standard output and standard error as a command needs them: what cannot be printed is no traceback.

Output that is a command's result must arrive, or the command fails with a sentence; what is said on standard error may
fail to be heard. A character that the user's locale lacks is written as its number.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from distconv.errors import StorageError


class _Stream(io.FileIO):
    """A standard stream that leads nowhere once it has failed, so that what is still in a buffer fails no second time.

    must_arrive: raise StorageError then. A reader that has left is told to the caller of standard output.
    """

    def __init__(self, descriptor: int, must_arrive: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.must_arrive = must_arrive

    def write(self, content: Any) -> int:
        try:
            return super().write(content) or 0
        except OSError as error:
            lead_nowhere(self.fileno())
            if self.must_arrive and isinstance(error, BrokenPipeError):
                raise
            if self.must_arrive:
                raise StorageError(f"standard output cannot be written: {error.strerror}") from None
            return memoryview(content).nbytes


def prepare_streams() -> None:
    """To be called once, before anything else is opened."""
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:  # where one was closed, a file of ours would take its place
        os.set_inheritable(free, True)  # an mpirun of ours needs it, too
    os.close(free)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name) or io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # None where it was closed
        stream: Any = _Stream(descriptor, must_arrive=name == "stdout")
        text = io.TextIOWrapper(
            io.BufferedWriter(stream),
            encoding=before.encoding,
            errors="backslashreplace",
            # Where nothing is to wait (python -u), a line goes out whole: its text and its end in two writes would let
            # a line of another rank come between.
            line_buffering=before.line_buffering or before.write_through,
        )
        setattr(sys, name, text)


def lead_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
