"""Numba's compiler, with a cache on disk that is neither stale nor believed blindly.

Numba compiles a function when it is first called. Its own cache would keep a kernel when a file that it is built from
changes, and loads whatever its files hold: a damaged one ends every run with a traceback, and a flipped bit of machine
code computes something else. Here the folder is named after all that the code depends on, and a file holds one kernel
for one signature, behind the SHA-256 of it. One that is not as it was written is removed and compiled anew. Files are
written whole or not at all, so ranks and hosts may share the folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import platformdirs
from numba.core.caching import FunctionCache
from numba.core.codegen import get_host_cpu_features
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

ROOM = 4 << 20  # bytes: the kernels of a version take no more
DIGEST = hashlib.sha256().digest_size


class Store:
    """Compiled kernels in a folder. say prints a line for the user; it is called once for each thing that happens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.say: Callable[[str], object] = lambda line: None
        self._said: set[str] = set()

    def holds_some(self) -> bool:
        """Whether an earlier process has left kernels for this version on this kind of processor."""
        with contextlib.suppress(OSError):
            return any(self.folder.glob("*.nbc"))
        return False

    def problem(self) -> str:
        """Why kernels cannot be kept, or nothing."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(bytes(ROOM))
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def load(self, name: str, rebuild: Callable[..., Any]) -> Any:
        """What rebuild makes of what was saved under a name; None where nothing was, or where that is not whole."""
        path = self.folder / f"{name}.nbc"
        if not os.path.lexists(path):
            self._tell_that_it_compiles()
            return None
        with contextlib.suppress(Exception):  # unreadable, or written by another build of Numba
            if path.is_file():
                content = path.read_bytes()
                if content[:DIGEST] == hashlib.sha256(content[DIGEST:]).digest():
                    return rebuild(*pickle.loads(content[DIGEST:]))
        self._say_once("damaged", f"a compiled kernel in {self.folder} is damaged or cannot be read: it is made anew")
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return None

    def save(self, name: str, content: tuple[Any, ...]) -> None:
        """Keep something under a name, if that can be done."""
        path, data = self.folder / f"{name}.nbc", dumps(content)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(hashlib.sha256(data).digest() + data)
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            self._say_once("unkept", f"compiling kernels, {self._not_kept(error.strerror or str(error))}")

    def _tell_that_it_compiles(self) -> None:
        if "compiling" in self._said:
            return
        why = self.problem()
        if why:
            self._said.add("unkept")
        how = self._not_kept(why) if why else "once for this version of distconv on this machine: some 10 to 20 s"
        self._say_once("compiling", f"compiling the kernels, {how}")

    def _not_kept(self, why: str) -> str:
        return (
            f"which takes some 10 to 20 s at every start, as they cannot be kept in {self.folder} ({why}): set "
            "NUMBA_CACHE_DIR to a folder that can be written"
        )

    def _say_once(self, what: str, line: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self.say(line)


def cpu_features() -> str:
    """What the processor can do that Numba compiles for, in LLVM's words; NUMBA_CPU_FEATURES may say another one."""
    return str(get_host_cpu_features() if numba.config.CPU_FEATURES is None else numba.config.CPU_FEATURES)


def _cache_folder() -> Path:
    """A folder of NUMBA_CACHE_DIR or the user's cache for these kernels on this kind of processor."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    processor = numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
    made_by = f"{sys.version} Numba {numba.__version__} for {processor} {cpu_features()}"
    content = hashlib.sha256(b"".join(source.read_bytes() for source in sources) + made_by.encode()).hexdigest()
    return Path(numba.config.CACHE_DIR or platformdirs.user_cache_path("distconv")) / f"kernels-{content[:12]}"


CACHE = Store(_cache_folder())


class _KernelCache(FunctionCache):  # type: ignore[misc]
    """What Numba asks for a kernel before it compiles one, and gives it afterwards."""

    def __init__(self, function: Callable[..., Any]) -> None:
        # What the base class needs to make keys and to describe itself; its own constructor would look for a folder.
        self._py_func, self._name, self._cache_path = function, repr(function), str(CACHE.folder)

    def load_overload(self, signature: Any, target: Any) -> Any:
        rtsys.initialize(target)  # target.refresh() would load what only compiling needs, for 0.4 s
        return CACHE.load(self._key(signature, target.codegen()), functools.partial(CompileResult._rebuild, target))

    def save_overload(self, signature: Any, result: Any) -> None:
        if not result.library.has_dynamic_globals:  # addresses of this process
            CACHE.save(self._key(signature, result.codegen), result._reduce())

    def _key(self, signature: Any, codegen: Any) -> str:
        key = hashlib.sha256(repr(self._index_key(signature, codegen)).encode()).hexdigest()
        return f"{self._py_func.__module__}.{self._py_func.__qualname__}-{key[:16]}".replace("<locals>.", "")


def compiled(function: Callable[..., Any]) -> Any:
    """numba.njit that lets other threads run, divides as NumPy does, and caches."""
    kernel = numba.njit(nogil=True, error_model="numpy")(function)
    kernel._cache = _KernelCache(function)
    return kernel
