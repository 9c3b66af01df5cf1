"""What one rank finds out about its process and its host. Nothing here fails or talks to other ranks.

Each function returns plain values, which travel to rank 0; where something cannot be found out, a text says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import platform
import shutil
import socket
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import distconv
from distconv.comm.start import reading_is_refused
from distconv.comm.world import World, blas_threads, cuda_aware_mpi
from distconv.process.launched import launched
from distconv.process.roll_call import own_name_resolves
from distconv.process.time_slices import own_cores

Facts = dict[str, Any]
SAME_EVERYWHERE = ("distconv", "code", "python", "numpy", "numba", "mpi4py", "mpi", "machine")  # on all ranks


def gather_facts(world: World) -> Facts:
    """All facts of this rank."""
    numpy = imported_version("numpy")
    return {
        "rank": world.rank,
        "host": socket.gethostname(),
        "launcher": launched().launcher or "none",
        "distconv": distconv.__version__,
        "code": code_digest(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "numpy": numpy,
        "numba": imported_version("numba"),
        "mpi4py": installed_version("mpi4py"),
        "mpi": world.library,
        "machine": platform.machine(),
        "cores": sorted(own_cores()),
        "host_cores": os.cpu_count() or 1,
        "core_limit": cgroup_cores(),
        "memory_limit": cgroup_memory(),
        "blas_threads": blas_threads(),
        "shared_memory": free_bytes("/dev/shm"),
        "reading_refused": reading_is_refused(),
        "name_resolves": own_name_resolves(),
        **working_folder(),
        "mnist": mnist_folder(),
        **kernel_cache(),
        **gpus(),
    }


def code_digest() -> str:
    """Of all sources of the package: hosts with another copy of it compute something else."""
    root = Path(distconv.__file__).parent
    sources = sorted(path for ending in ("py", "cu") for path in root.rglob(f"*.{ending}"))
    sha = hashlib.sha256()
    for path in sources:
        sha.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:12]


def imported_version(package: str) -> str:
    """The version of a package as this process imports it, or why it cannot."""
    try:
        return str(importlib.import_module(package).__version__)
    except Exception as error:  # whatever a broken installation does
        return f"cannot be imported ({type(error).__name__}: {error})"


def installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cgroup_cores() -> float | None:
    """The cores that a container or a job may use, by version 2 or 1 of control groups; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = (Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
        return None if int(quota) < 0 else int(quota) / int(period)
    return None


def cgroup_memory() -> int | None:
    """The bytes of memory that a container or a job may use; None without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limit = int(Path("/sys/fs/cgroup", name).read_text())
            return limit if limit < 1 << 60 else None
    return None


def free_bytes(path: str | Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def working_folder() -> Facts:
    """The current folder, where runs are written."""
    try:
        folder = Path.cwd()
    except FileNotFoundError:
        return {"folder": "the current folder", "folder_free": None, "folder_problem": "it has been removed"}
    return {"folder": str(folder), "folder_free": free_bytes(folder), "folder_problem": write_problem(folder)}


def write_problem(folder: Path) -> str:
    """Why no file can be written in a folder, or nothing."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def mnist_folder() -> str:
    """Where MNIST's four files are, which are not read here; or nothing."""
    try:
        from distconv.data import mnist
    except Exception:  # no NumPy: told as its version
        return ""
    folder = mnist.chosen_folder()
    return str(folder) if mnist.is_complete(folder) else ""


def kernel_cache() -> Facts:
    """Whether compiled kernels are there, and why they cannot be kept, or nothing."""
    try:
        from distconv.kernels import compiled
    except Exception:  # no Numba, or a broken one: told as its version
        return {"compiled": False, "cache_problem": ""}
    return {"compiled": compiled.CACHE.holds_some(), "cache_problem": compiled.CACHE.problem()}


def gpus() -> Facts:
    """The GPUs that this process sees, the driver's and NCCL's versions, whether MPI takes addresses of a GPU."""
    facts: Facts = {"gpus": [], "gpu_problem": "", "driver": "", "nccl": "", "cuda_mpi": ""}
    try:
        from distconv.kernels.gpu.device import versions, visible

        found = visible()
    except Exception as error:
        return {**facts, "gpu_problem": str(error)}
    driver, nccl = versions()
    names = [gpu.name for gpu in found]
    return {**facts, "gpus": names, "driver": driver, "nccl": nccl, "cuda_mpi": cuda_aware_mpi() or "yes"}
