"""The ranks of a job must run the same code: with another of the same layout, one of them would train another model."""

from __future__ import annotations

import hashlib
import platform
import sys
from importlib import metadata
from pathlib import Path

from distconv.comm.world import World
from distconv.factory import is_factory

PACKAGE = Path(__file__).parents[1]


def agree_on_code(world: World, *names: str) -> None:
    """Raise MismatchError on all ranks where they do not run the same code; collective, some milliseconds.

    names: of the model and the data set, which are loaded; of package.module:function, the user's own modules count.
    """
    world.agree("the versions of Python and its packages", versions(), "give all hosts the same environment")
    ours = sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".cu"))
    world.agree("the code of distconv", " ".join(map(digest, ours)), "give all hosts the same installation")
    for name in filter(is_factory, names):
        module = name.partition(":")[0]
        here = own_code(module)
        first = world.comm.bcast(here)  # a module that only some ranks have loaded is no disagreement
        compared = [here.get(loaded, code) for loaded, code in sorted(first.items())]
        world.agree(f"the code of {name}", " ".join(compared), f"give all hosts the same {module} and what it imports")


def versions() -> str:
    """What computes, besides distconv."""
    packages = (f"{package} {metadata.version(package)}" for package in ("numpy", "numba", "llvmlite"))
    return ", ".join([f"Python {platform.python_version()}", *packages])


def own_code(module: str) -> dict[str, str]:
    """Digests by name of a user's module, if it is loaded, and of the loaded modules of its package or beside it."""
    package = module.partition(".")[0]
    modules = sys.modules.copy().items()
    files = {name: Path(file) for name, loaded in modules if (file := getattr(loaded, "__file__", None))}
    folders = {files[name].parent for name in (module, package) if name in files}
    return {
        name: digest(file)
        for name, file in files.items()
        if (file.parent in folders or name.startswith(f"{package}.")) and file.is_file()
    }


def digest(file: Path) -> str:
    """SHA-256 of a file's name and content."""
    return hashlib.sha256(f"{file.name} ".encode() + file.read_bytes()).hexdigest()
