"""A GPU through CuPy: its memory, its kernels, its graphs. CuPy is imported when a Cuda is made, not with this file.

arithmetic.py uses a device through these methods only, so that the tests can put a device of their own in its place,
one that runs the same CUDA source on the CPU.
"""

from __future__ import annotations

import functools
import gc
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from distconv.kernels.gpu import nccl
from distconv.kernels.interface import Agreed

Array = Any  # an array on the device
Defines = tuple[tuple[str, int], ...]
Kernel = Callable[..., None]  # kernel((x, y, z) of the grid, threads of a block, *arguments)
Result = TypeVar("Result")
NOT_INSTALLED = "CuPy is not installed"
DEFAULT_DIRECTION = 4  # of cudaMemcpy: the addresses tell
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
UUID_BYTES = 16


@dataclass(frozen=True)
class Visible:
    """A GPU that this process sees, or a part of one (MIG). identity: another one for each, on all hosts."""

    name: str
    identity: str
    capability: int  # 90 for sm_90


def visible() -> list[Visible]:
    """The GPUs that this process may use, by their ordinal. Raises RuntimeError with the reason where there is none."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(
            f"CuPy is not installed ({error}): pip install 'distconv[cuda12]' or 'distconv[cuda13]'"
        ) from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
        properties = [cupy.cuda.runtime.getDeviceProperties(i) for i in range(count)]
    except Exception as error:  # no driver, an old one, a GPU in another's hands: CuPy has many ways to say so
        raise RuntimeError(f"CUDA finds no GPU ({error})") from None
    if not properties:
        raise RuntimeError("CUDA finds no GPU: see CUDA_VISIBLE_DEVICES and what your scheduler gave this job")
    return [Visible(p["name"].decode(), _identity(p), 10 * p["major"] + p["minor"]) for p in properties]


def _identity(properties: Mapping[str, Any]) -> str:
    """The UUID. CuPy reads up to a zero byte, and where that is in it, the PCI address tells, which MIG parts share."""
    uuid = bytes(properties["uuid"])[:UUID_BYTES]
    if len(uuid) == UUID_BYTES:
        return uuid.hex()
    address = ":".join(f"{properties[f'pci{part}ID']:x}" for part in ("Domain", "Bus", "Device"))
    return f"{uuid.hex()} at {address} of {socket.gethostname()}"


def versions() -> tuple[str, str]:
    """Of CUDA as the driver has it, and of NCCL, or why there is none."""
    import cupy

    driver = cupy.cuda.runtime.driverGetVersion()
    try:
        library = nccl.library()
        number = library.get_version() if library.available else 0
    except ImportError:
        number = 0
    return f"CUDA {driver // 1000}.{driver // 10 % 100}", nccl.written(number) if number else "not installed"


@functools.cache
def _stream(ordinal: int, name: str = "main") -> Any:
    """The streams of all Cudas of a GPU are the same, as CuPy starts every kernel in the thread's current stream."""
    import cupy

    with cupy.cuda.Device(ordinal):
        return cupy.cuda.Stream(non_blocking=True)  # a blocking one cannot be recorded while others look at it


def _memory(nbytes: int) -> Any:
    """New memory for the pool of a recording.

    A pool that CUDA refuses memory gives back what lies free in it, and tries again. Kernels that were recorded a
    moment ago may use just that. It does not where the refusal is another error than CUDA's.
    """
    from cupy import cuda

    try:
        return cuda.MemoryPointer(cuda.Memory(nbytes), 0)
    except cuda.runtime.CUDARuntimeError as error:
        if error.status != OUT_OF_MEMORY:
            raise
        raise MemoryError(f"{nbytes:,} bytes more cannot be had") from None


@dataclass
class _Recording:
    """Work that is done again and again: first plainly, then from its graph."""

    pool: Any  # the memory of its arrays, which nobody else gets
    graph: Any = None
    result: Any = None
    refused: bool = False


class Cuda:
    """The GPU of this ordinal, from now on the current one of this thread; its work is in one stream, but for `beside`.

    say: prints a line for the user.
    """

    def __init__(self, ordinal: int, say: Callable[[str], None]) -> None:
        import cupy

        self.cupy, self.say, self.ordinal = cupy, say, ordinal
        cupy.cuda.Device(ordinal).use()
        self.name = visible()[ordinal].name
        self.stream, self.side = _stream(ordinal), _stream(ordinal, "side")
        self.stream.use()
        self.beside_use: list[Any] = []  # what the work on the side stream uses
        self.recordings: dict[Any, _Recording] = {}
        self.records = True  # and replays; where not, `replayed` works plainly
        self.functions: dict[Any, Kernel] = {}
        self.modules: dict[Any, Any] = {}

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        return self.cupy.empty(shape, dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
        return self.cupy.zeros(shape, dtype)

    def upload(self, array: NDArray[Any], start: int = 0) -> Array:
        """A copy on the device; its element `start` lies at a multiple of 16 bytes, which a kernel loads at once."""
        copy = self.cupy.asarray(np.ascontiguousarray(array))
        if ahead := -start * array.itemsize % 16 // array.itemsize:
            placed = self.cupy.empty(ahead + array.size, array.dtype)[ahead:].reshape(array.shape)
            placed[...] = copy
            return placed
        return copy

    def download(self, array: Array) -> NDArray[Any]:
        """A copy on the host, once the work before is done."""
        host: NDArray[Any] = self.cupy.asnumpy(array)
        return host

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Memory of the host that the GPU can read and write while this process computes."""
        import cupyx

        memory: NDArray[np.uint8] = cupyx.empty_pinned(nbytes, np.uint8)
        memory[...] = 0
        return memory

    def mapped(self, pinned: NDArray[Any]) -> Array:
        """Memory of pinned(), at its own address, as kernels take it."""
        memory = self.cupy.cuda.UnownedMemory(pinned.ctypes.data, pinned.nbytes, pinned, self.ordinal)
        return self.cupy.ndarray(pinned.shape, pinned.dtype, self.cupy.cuda.MemoryPointer(memory, 0))

    def contiguous(self, array: Array) -> Array:
        """The array, or a copy whose numbers follow one another."""
        return self.cupy.ascontiguousarray(array)

    def address(self, array: Array) -> int:
        """Of an array on the device."""
        return int(array.data.ptr)

    def copy(self, to: Array, source: Array) -> None:
        """Copy bytes between contiguous arrays of the device and pinned memory, in the stream's turn."""
        if to.nbytes != source.nbytes:
            raise ValueError(f"{source.nbytes} bytes do not fit into {to.nbytes}")
        addresses = [a.ctypes.data if isinstance(a, np.ndarray) else a.data.ptr for a in (to, source)]
        self.cupy.cuda.runtime.memcpyAsync(*addresses, to.nbytes, DEFAULT_DIRECTION, self.stream.ptr)

    def function(self, source: str, name: str, defines: Defines = ()) -> Kernel:
        """A kernel of CUDA source, compiled with these macros."""
        key = source, name, defines
        if key not in self.functions:
            self.functions[key] = self._function(*key)
        return self.functions[key]

    def _function(self, source: str, name: str, defines: Defines) -> Kernel:
        kernel, ndarray = self._module(source, defines).get_function(name), self.cupy.ndarray

        def launch(grid: tuple[int, int, int], threads: int, *arguments: Any) -> None:
            for argument in arguments:  # CuPy passes an address and forgets the strides
                if isinstance(argument, ndarray) and not argument.flags.c_contiguous:
                    raise ValueError(f"{name}: an array of shape {argument.shape} is not contiguous")
            kernel(grid, (threads, 1, 1), arguments)

        return launch

    def _module(self, source: str, defines: Defines) -> Any:
        key = source, defines
        if key not in self.modules:
            options = tuple(f"-D{macro}={value}" for macro, value in defines)
            self.modules[key] = self.cupy.RawModule(code=source, options=options)
        return self.modules[key]

    def beside(self, work: Callable[[], object], *used: Array) -> None:
        """Start work that need not be done before join(), beside what is started meanwhile. used: the arrays it uses.

        Nothing else may write to them, nor read what it writes, before join().
        """
        self.beside_use += used  # else their memory would be given to what follows
        self._order(self.stream, self.side)
        self.side.use()
        try:
            work()
        finally:
            self.stream.use()

    def join(self) -> None:
        """What is started from now on comes after all that was started beside."""
        if self.beside_use:
            self._order(self.side, self.stream)
            self.beside_use.clear()

    def _order(self, first: Any, second: Any) -> None:
        event = self.cupy.cuda.Event(disable_timing=True)
        event.record(first)
        second.wait_event(event)

    def mark(self) -> Any:
        """A point behind all work that was started so far, for wait()."""
        event = self.cupy.cuda.Event(disable_timing=True)
        event.record(self.stream)
        return event

    def wait(self, mark: Any) -> None:
        """Wait until the work before the mark is done."""
        mark.synchronize()

    def stamp(self) -> Any:
        """A point of the work that was started so far, of whose time `nanoseconds` tells."""
        event = self.cupy.cuda.Event()
        event.record(self.stream)
        return event

    def nanoseconds(self, first: Any, last: Any) -> int:
        """From one stamp to another, when the work before them is done; as fine as CUDA tells, about half a us."""
        milliseconds: float = self.cupy.cuda.get_elapsed_time(first, last)
        return round(1e6 * milliseconds)

    def synchronize(self) -> None:
        """Wait until all work is done."""
        self.stream.synchronize()

    def replayed(self, key: Any, work: Callable[[], Result], agreed: Agreed | None = None) -> Result:
        """The result of work(), which is the same device work each time that it is called with this key.

        The first time it runs plainly, which compiles; the second time it is recorded as a CUDA graph; from then on
        the graph is replayed, at one launch for all. The arrays of a recording keep their addresses, and their memory
        is nobody else's; its result is the same arrays each time. Where CUDA will not record, it says so and works on
        plainly. agreed: for work that holds messages to other ranks, which NCCL has all ranks replay, or none; they
        call it together.
        """
        recording = self.recordings.get(key)
        if recording is None:
            recording = self.recordings[key] = _Recording(self.cupy.cuda.MemoryPool(_memory))
        elif self.records and recording.graph is None and not recording.refused:
            self._record(recording, work, agreed or (lambda problem: problem))
        if recording.graph is None or not self.records:
            with self.cupy.cuda.using_allocator(recording.pool.malloc):
                return work()
        recording.graph.launch(self.stream)
        result: Result = recording.result
        return result

    def _record(self, recording: _Recording, work: Callable[[], Any], agreed: Agreed) -> None:
        problem, collecting = None, gc.isenabled()
        gc.disable()  # an array freed now would end the recording
        try:
            with self.cupy.cuda.using_allocator(recording.pool.malloc):
                recording.graph, recording.result = self._record_work(work)
        except Exception as error:
            problem = str(error) or type(error).__name__
        finally:
            if collecting:
                gc.enable()
        if problem := agreed(problem):
            if not any(one.refused for one in self.recordings.values()):
                self.say(
                    f"the GPU's work cannot be recorded as a CUDA graph, so its kernels start one by one: {problem}"
                )
            recording.graph, recording.result, recording.refused = None, None, True

    def _record_work(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        self.stream.begin_capture()
        try:
            result = work()
        finally:
            graph = self.stream.end_capture()  # raises where the work cannot be recorded
        graph.upload(self.stream)
        return graph, result

    def peaks(self) -> tuple[float, float]:
        """FLOP/s of a float32 matrix product (cuBLAS) and bytes/s of a copy, the best of some, measured."""
        n, nbytes = 4096, 1 << 28
        a, b = self.cupy.random.standard_normal((2, n, n), dtype=np.float32)
        c, here = self.cupy.empty_like(a), self.cupy.zeros((2, nbytes), np.uint8)
        product = self._best_seconds(lambda: self.cupy.matmul(a, b, out=c))
        copy = self._best_seconds(lambda: self.copy(here[0], here[1]))
        return 2 * n**3 / product, 2 * nbytes / copy  # a copy reads and writes

    def _best_seconds(self, work: Callable[[], object]) -> float:
        times = []
        for _ in range(10):
            start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
            start.record(self.stream)
            work()
            end.record(self.stream)
            end.synchronize()
            times.append(self.cupy.cuda.get_elapsed_time(start, end) / 1e3)
        return float(min(times))

    def nccl_problem(self) -> str | None:
        """Why NCCL cannot be used here, if it cannot."""
        return None if nccl.library().available else "its library is not installed"

    def nccl_version(self) -> str:
        """Of NCCL's library. Raises an error of many kinds where this rank could not join the others."""
        self.stream.use()  # refuses to, where another GPU has become the current one
        self.stream.synchronize()  # raises what has gone wrong on the GPU
        return nccl.written(nccl.library().get_version())

    def nccl_identity(self) -> Any:
        """What the ranks must share to find each other."""
        return nccl.library().get_unique_id()

    def nccl(self, size: int, rank: int, identity: Any) -> nccl.Nccl:
        """The ranks' GPUs, joined; collective over them."""
        return nccl.Nccl(size, rank, identity, self.stream, self.recordings)
