"""One voice for the ranks of a host, where no communicator can tell who should speak."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from distconv.process.launched import GRACE, launched, launcher_process

_CLAIMS: list[socket.socket] = []  # a socket that nobody refers to would be closed, and its name free


def claim(right: str) -> bool:
    """Whether this is the first rank of its job on this host that claims the right; it keeps it until it ends."""
    if launched().alone:
        return True
    holder = socket.socket(socket.AF_UNIX)
    try:
        numbering = Path("/proc/self/ns/pid").stat().st_ino  # two containers may both have a launcher that is process 7
        # A name that no file has, and only one process at a time.
        holder.bind(f"\0distconv-{right}-{os.getuid()}-{numbering}-{launcher_process() or os.getppid()}")
    except OSError:
        holder.close()
        return False
    _CLAIMS.append(holder)
    return True


def speak(sentence: str) -> None:
    """Say the sentence, if no other rank of this host has spoken so; it may be the last that this rank says."""
    if not claim("spoken"):
        time.sleep(GRACE)
        return
    if launched().rank > 0:
        time.sleep(GRACE / 2)  # rank 0 of another host, if it fails alike, speaks for all and ends the job
    write(sentence)
    time.sleep(GRACE / 4)


def write(sentence: str) -> None:
    """One line on standard error, past Python's buffer, which another thread may hold; no matter if nobody hears.

    A name in it may have characters that no locale can show, or that a terminal would obey: those are written as such.
    """
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in sentence)
    with contextlib.suppress(OSError):
        os.write(2, f"distconv: {shown}\n".encode())
