"""A GPU for machines without one: builds the CUDA C++ of the kernels with g++ and runs it on the CPU.

On a GPU a wrong argument or a write outside an array is silent garbage. Here both raise. See cuda_shim.h for the rest.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

T = TypeVar("T")
Kernel = Callable[..., None]

SHIM = Path(__file__).with_name("cuda_shim.h")
WARNINGS = ("-Wall", "-Werror", "-Wno-unused-function", "-Wno-unknown-pragmas", "-Wno-sign-compare")
ARITHMETIC = ("-ffp-contract=off", "-fno-strict-aliasing")
# The shim holds the two functions that these checks call, so their library stays out: hence -nodefaultlibs.
CHECKS = ("-fsanitize=bounds,alignment", "-fno-sanitize-recover=all", "-nodefaultlibs", "-lstdc++", "-lm", "-lc")
# Fortified, longjmp takes the switch to another stack for an attack. Unique, a static variable of a template would be
# the same in all libraries of the process.
BUILD = ("-std=c++17", "-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-fno-gnu-unique", *WARNINGS, *ARITHMETIC)

GUARD = 4096  # bytes before and after each array
ALIGNMENT = 256  # as the allocations of CUDA

NESTED = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
SIGNATURE = re.compile(
    rf'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*(?P<bounds>{NESTED})\s*)?'
    r"(?P<name>\w+)\s*\((?P<parameters>[^()]*)\)\s*\{"
)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
TYPES = {
    "float": np.float32,
    "double": np.float64,
    "unsigned char": np.uint8,
    "unsigned short": np.uint16,
    "int": np.int32,
    "unsigned": np.uint32,
    "unsigned int": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
}


def available() -> bool:
    """Can this machine build and run the shim?"""
    return sys.platform == "linux" and shutil.which("g++") is not None


class Allocation:
    """Memory of one array between two guards. NumPy keeps it as the `base` of the array and of all its views."""

    serial = 0

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, pinned: bool = False) -> None:
        self.pinned = pinned
        size = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        memory = np.empty(size + 2 * GUARD + ALIGNMENT, np.uint8)
        start = GUARD + -(memory.ctypes.data + GUARD) % ALIGNMENT
        memory[start : start + size] = 0xFF
        self.guards = {
            "before its start": memory[start - GUARD : start],
            "after its end": memory[start + size : start + size + GUARD],
        }
        # As float32 a signalling NaN: one read poisons the result, and arithmetic on it never gives the same bits back.
        # Another one for each array, so that copying from guard to guard shows as well.
        Allocation.serial += 1
        self.pattern = np.full(GUARD // 2, 0xFF81 + Allocation.serial % 63, "<u2").view(np.uint8)
        for guard in self.guards.values():
            guard[:] = self.pattern
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": np.dtype(dtype).str,
            "data": (memory.ctypes.data + start, False),
        }

    def damage(self) -> str | None:
        """Where a guard was overwritten, if one was. Repaired, so that the next launch is not blamed."""
        found = [side for side, guard in self.guards.items() if not np.array_equal(guard, self.pattern)]
        for side in found:
            self.guards[side][:] = self.pattern
        return " and ".join(found) or None


def allocation_of(array: NDArray[Any]) -> Allocation | None:
    """The memory that an array or a view lies in; None if it is not the emulator's."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, Allocation) else None


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel."""

    name: str
    dtype: np.dtype[Any] | None  # None for any: void *
    pointer: bool

    def converted(self, kernel: str, value: object) -> Any:
        """The argument for ctypes, or a TypeError where a GPU would read garbage."""
        kind = "an array" if self.pointer else "a NumPy scalar"
        wanted = f"{kernel}: {self.name} must be {kind} of {self.dtype or 'any type'}"
        if not isinstance(value, np.ndarray if self.pointer else np.generic):
            raise TypeError(f"{wanted}, not {type(value).__name__}")
        if self.dtype and value.dtype != self.dtype:
            raise TypeError(f"{wanted}, not {value.dtype}")
        if not self.pointer:
            return np.ctypeslib.as_ctypes_type(self.dtype)(value.item())
        if not value.flags.c_contiguous:
            raise TypeError(f"{wanted}, contiguous: its strides are {value.strides}")
        allocation = allocation_of(value)
        if allocation is None or allocation.pinned:
            raise TypeError(f"{wanted} on the device, not in host memory")
        return ctypes.c_void_p(value.ctypes.data)


@dataclass(frozen=True)
class Signature:
    """A kernel as its source declares it."""

    name: str
    bounds: str
    declaration: str
    parameters: tuple[Parameter, ...]

    def trampoline(self) -> str:
        """C++ that ctypes can call."""
        declared = "".join(f", {part}" for part in self.declaration.split(",") if part.strip())
        names = ", ".join(parameter.name for parameter in self.parameters)
        return (
            f'\nextern "C" unsigned most_threads_{self.name}() {{ unsigned all[] = {{{self.bounds}}}; return all[0]; }}'
            f'\nextern "C" const char *launch_{self.name}(unsigned x_, unsigned y_, unsigned z_, unsigned threads_'
            f"{declared}) {{ return emulated::launch(x_, y_, z_, threads_, [&] {{ {self.name}({names}); }}); }}\n"
        )


def parameter(kernel: str, text: str) -> Parameter:
    """Parse one parameter: its type, perhaps a star, its name."""
    words = [word for word in text.replace("*", " * ").split() if word not in ("const", "__restrict__")]
    kind = " ".join(words[:-1])
    if kind == "void *":
        return Parameter(words[-1], None, pointer=True)
    if kind.removesuffix(" *") not in TYPES:
        raise ValueError(f"{kernel}: cannot tell the type of {text.strip()!r}")
    return Parameter(words[-1], np.dtype(TYPES[kind.removesuffix(" *")]), kind.endswith(" *"))


def signatures(source: str) -> dict[str, Signature]:
    """All kernels of a source by name."""
    text = COMMENT.sub(" ", source)
    found = {}
    for match in SIGNATURE.finditer(text):
        name, declaration = match["name"], match["parameters"]
        parameters = tuple(parameter(name, part) for part in declaration.split(",") if part.strip())
        found[name] = Signature(name, (match["bounds"] or "(1024)")[1:-1], declaration, parameters)
    if len(found) != text.count("__global__"):
        raise ValueError(f'not every __global__ is declared as extern "C" __global__ void; understood: {list(found)}')
    return found


@functools.cache
def kernel_folder() -> Path:
    """Where compiled kernels are kept, in the checkout, for the other processes and for the next run of the tests."""
    folder = Path(__file__).parent.parent / ".emulated_kernels"
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def library(source: str, defines: tuple[tuple[str, int], ...], folder: Path) -> ctypes.PyDLL:
    """Compile and load, unless that happened before. PyDLL keeps the interpreter's lock: one launch at a time."""
    text = source + "".join(signature.trampoline() for signature in signatures(source).values())
    options = [*BUILD, *(f"-D{name}={value}" for name, value in defines), "-include", str(SHIM)]
    digest = hashlib.sha256(repr((text, SHIM.read_text(), options, CHECKS)).encode()).hexdigest()
    built = folder / f"{digest}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed when ready: processes may share the folder
            code, result = Path(scratch, "kernels.cpp"), Path(scratch, "kernels.so")
            code.write_text(text)
            command = ["g++", *options, "-o", str(result), str(code), *CHECKS]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"g++ failed:\n{done.stderr}")
            result.replace(built)
    return ctypes.PyDLL(str(built))


def launcher(signature: Signature, built: ctypes.PyDLL) -> Kernel:
    """The kernel as a function of Python."""
    name, launch = signature.name, built[f"launch_{signature.name}"]
    launch.restype = ctypes.c_char_p
    most_threads = built[f"most_threads_{name}"]()

    def kernel(grid: tuple[int, int, int], threads: int, *values: Any) -> None:
        if not (0 < threads <= most_threads and 0 < grid[0] < 2**31 and all(0 < size < 65536 for size in grid[1:])):
            raise ValueError(f"{name}: cannot launch {grid} blocks of {threads} threads, {most_threads} at the most")
        if len(values) != len(signature.parameters):
            raise TypeError(f"{name} takes {len(signature.parameters)} arguments, got {len(values)}")
        pairs = list(zip(signature.parameters, values, strict=True))
        failure = launch(*map(ctypes.c_uint, (*grid, threads)), *(one.converted(name, value) for one, value in pairs))
        for one, value in pairs:
            allocation = allocation_of(value) if one.pointer else None
            if allocation and (damage := allocation.damage()):
                raise AssertionError(f"{name} wrote outside {one.name}, {damage}")
        if failure:
            raise AssertionError(f"{name}: {failure.decode()}")

    return kernel


class Emulator:
    """The device."""

    name = "emulated"

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: where compiled kernels go, for processes that share them; else kernel_folder()."""
        self.folder = folder
        self.tape: list[Callable[[], None]] | None = None  # that is being recorded
        self.tapes: dict[object, Any] = {}
        self.later: list[Callable[[], object]] = []

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """An array full of NaN, or of all bits 1: what a kernel forgets to write shows."""
        return np.asarray(Allocation(tuple(np.atleast_1d(shape).tolist()), dtype))

    def zeros(self, shape: int | Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def upload(self, array: ArrayLike, start: int = 0) -> NDArray[Any]:
        self._refuse_to_record()
        host = np.asarray(array)
        ahead = -start * host.itemsize % 16 // host.itemsize
        device = np.asarray(Allocation((ahead + host.size,), host.dtype))[ahead:].reshape(host.shape)
        device[...] = host
        return device

    def download(self, array: NDArray[Any]) -> NDArray[Any]:
        self._refuse_to_record()
        return array.copy()

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that `copy` takes, and kernels only as `mapped` gives it: the same memory, the same guards."""
        array = np.asarray(Allocation((nbytes,), np.uint8, pinned=True))
        array[...] = 0
        return array

    def mapped(self, pinned: NDArray[Any]) -> NDArray[Any]:
        allocation = copy.copy(allocation_of(pinned))
        if allocation is None or not allocation.pinned or not pinned.flags.c_contiguous:
            raise TypeError("only contiguous pinned memory can be mapped")
        allocation.pinned, allocation.__array_interface__ = False, pinned.__array_interface__
        return np.asarray(allocation)

    def contiguous(self, array: NDArray[Any]) -> NDArray[Any]:
        if array.flags.c_contiguous and allocation_of(array):
            return array
        device = self.empty(array.shape, array.dtype)
        self.do(lambda: np.copyto(device, array))
        return device

    def address(self, array: NDArray[Any]) -> int:
        return array.ctypes.data

    def copy(self, to: NDArray[Any], source: NDArray[Any]) -> None:
        if not all(allocation_of(array) and array.flags.c_contiguous for array in (to, source)):
            raise TypeError("copy takes contiguous arrays, on the device or pinned")
        if to.nbytes != source.nbytes:
            raise ValueError(f"copy of {source.nbytes} bytes to {to.nbytes}")
        there, here = to.reshape(-1).view(np.uint8), source.reshape(-1).view(np.uint8)
        self.do(lambda: np.copyto(there, here))

    def function(self, source: str, name: str, defines: tuple[tuple[str, int], ...] = ()) -> Kernel:
        """A kernel of a source: call it with the grid, the threads of a block, then its arguments."""
        kernels = signatures(source)
        if name not in kernels:
            raise ValueError(f"no kernel {name!r} in the source, only {sorted(kernels)}")
        start = launcher(kernels[name], library(source, tuple(defines), self.folder or kernel_folder()))
        return lambda *arguments: self.do(lambda: start(*arguments))

    def beside(self, work: Callable[[], object], *used: NDArray[Any]) -> None:
        """Done as late as it may be, so who uses its results too early, or writes what it uses, has other results."""
        self.later.append(work)

    def join(self) -> None:
        while self.later:
            self.later.pop(0)()

    def mark(self) -> None:
        self._refuse_to_record()

    def wait(self, mark: None) -> None:
        self._refuse_to_record()

    def synchronize(self) -> None:
        """Nothing to wait for: launches return when they are done."""
        self._refuse_to_record()

    def replayed(
        self, key: object, work: Callable[[], T], agreed: Callable[[str | None], str | None] | None = None
    ) -> T:
        """As a GPU: the first time plainly, the second time recorded, then replayed, whatever `work` would do by then.

        So what a step takes from the host by any other way than through `copy` is found out by its third time.
        """
        if key not in self.tapes:
            self.tapes[key] = None
            return work()
        if self.tapes[key] is None:
            self.tape = []
            try:
                self.tapes[key] = (self.tape, work())
            finally:
                self.tape = None
            assert agreed is None or agreed(None) is None
        else:
            for call in self.tapes[key][0]:
                call()
        return self.tapes[key][1]

    def do(self, call: Callable[[], None]) -> None:
        """Work in the stream's turn: what a tape holds."""
        if self.tape is not None:
            self.tape.append(call)
        call()

    def nccl_problem(self) -> str | None:
        return "there is none for an emulated device"

    def _refuse_to_record(self) -> None:
        if self.tape is not None:
            raise RuntimeError("CUDA does not record that: the host would have to wait, or its pages could move")
