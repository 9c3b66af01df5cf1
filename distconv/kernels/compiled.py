"""Numba with a cache on disk that a new version of the kernels does not find stale.

Numba compiles a function when it is first called, and keeps the machine code in a file. It looks at the date of the
function's own file only, so a kernel would stay what it was when a file that it is built from changes. Here the folder
of the cache is named after the content of all kernels. Numba itself writes files whole or not at all, and tells
processors apart, so ranks and hosts may share the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import platformdirs


def _cache_folder() -> Path | None:
    """The folder of these kernels in NUMBA_CACHE_DIR or the user's cache, or None where it cannot be written."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    content = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    parent = Path(numba.config.CACHE_DIR or platformdirs.user_cache_path("distconv"))
    folder = parent / f"kernels-{content[:12]}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return folder if os.access(folder, os.W_OK) else None
    return None


CACHE = _cache_folder()
MUST_COMPILE = CACHE is None or not any(CACHE.rglob("*.nbi"))  # no earlier process has left compiled kernels


def compiled(function: Callable[..., Any]) -> Any:
    """numba.njit that lets other threads run, divides as NumPy does, and caches."""
    with _numba_caches_in(CACHE):
        return numba.njit(nogil=True, error_model="numpy", cache=CACHE is not None)(function)


@contextlib.contextmanager
def _numba_caches_in(folder: Path | None) -> Iterator[None]:
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder or "")
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
