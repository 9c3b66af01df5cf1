"""How work on a GPU is recorded, and what happens where it cannot be, and the end of it: a stand-in for CuPy.

See test_gpu.py for the same on a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from distconv.kernels.gpu import device as cuda
from distconv.kernels.gpu.nccl import Nccl
from tests import jobs


class Stream:
    """Records what is done between begin_capture and end_capture, or refuses to, as CUDA does: at the end."""

    def __init__(self, refuses: bool) -> None:
        self.refuses, self.capturing, self.log = refuses, False, list[str]()

    def do(self, what: str) -> None:
        if not self.capturing:
            self.log.append(what)

    def begin_capture(self) -> None:
        assert not gc.isenabled()
        self.capturing = True

    def end_capture(self) -> Any:
        self.capturing = False
        if self.refuses:
            raise RuntimeError("cudaErrorStreamCaptureInvalidated")
        return SimpleNamespace(upload=lambda stream: None, launch=lambda stream: self.log.append("graph"))


@pytest.fixture
def make_device() -> Iterator[Callable[[bool], tuple[cuda.Cuda, Stream, list[str]]]]:
    @contextlib.contextmanager
    def using_allocator(malloc: object) -> Iterator[None]:
        yield

    def make(refuses: bool) -> tuple[cuda.Cuda, Stream, list[str]]:
        device, stream, said = object.__new__(cuda.Cuda), Stream(refuses), list[str]()
        pool = SimpleNamespace(malloc=None)
        device.cupy = SimpleNamespace(
            cuda=SimpleNamespace(MemoryPool=lambda allocator: pool, using_allocator=using_allocator)
        )
        device.stream, device.say, device.recordings, device.records = stream, said.append, {}, True
        return device, stream, said

    yield make
    assert gc.isenabled()


Make = Callable[[bool], tuple[cuda.Cuda, Stream, list[str]]]


def test_work_runs_plainly_once_and_then_from_its_graph(make_device: Make) -> None:
    device, stream, said = make_device(False)
    results = [device.replayed("a", lambda: stream.do("kernels")) for _ in range(4)]
    device.replayed("b", lambda: stream.do("others"))
    assert stream.log == ["kernels", "graph", "graph", "graph", "others"]
    assert results == [None] * 4 and said == []


def test_where_cuda_refuses_to_record_one_line_says_so_and_work_goes_on_plainly(make_device: Make) -> None:
    device, stream, said = make_device(True)
    for key in ("a", "a", "a", "b", "b"):
        device.replayed(key, lambda: stream.do("kernels"))
    assert stream.log == ["kernels"] * 5
    assert len(said) == 1 and "one by one: cudaErrorStreamCaptureInvalidated" in said[0]


def test_what_another_rank_cannot_record_this_one_does_not_replay(make_device: Make) -> None:
    device, stream, said = make_device(False)
    told = list[str | None]()

    def agreed(problem: str | None) -> str:
        told.append(problem)
        return "rank 1: no memory"

    for _ in range(4):
        device.replayed("a step with messages", lambda: stream.do("kernels"), agreed)
        device.replayed("another", lambda: stream.do("others"))
    assert stream.log == ["kernels", "others", "kernels", "graph", "kernels", "graph", "kernels", "graph"]
    assert told == [None] and len(said) == 1 and "one by one: rank 1: no memory" in said[0]


def test_a_recording_for_which_memory_is_short_is_given_up_and_takes_none_from_itself(
    make_device: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CudaError(RuntimeError):
        def __init__(self, status: int) -> None:
            super().__init__(f"status {status}")
            self.status = status

    def refuse(nbytes: int) -> None:
        raise CudaError(nbytes)

    runtime = SimpleNamespace(CUDARuntimeError=CudaError)
    library = SimpleNamespace(Memory=refuse, MemoryPointer=None, runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=library))  # type: ignore[arg-type]
    with pytest.raises(CudaError, match="status 700"):
        cuda._memory(700)
    device, stream, said = make_device(False)

    def work() -> None:
        if stream.capturing:
            cuda._memory(cuda.OUT_OF_MEMORY)  # not CUDA's error, for which a pool would give back what it has
        stream.do("kernels")

    for _ in range(3):
        device.replayed("a", work)
    assert stream.log == ["kernels"] * 3 and device.recordings["a"].graph is None and not stream.capturing
    assert len(said) == 1 and "one by one: 2 bytes more cannot be had" in said[0]


def test_gpus_whose_uuid_cupy_has_cut_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(ordinal: int) -> dict[str, Any]:
        """Of two GPUs, of two parts of a third one, and of one whose UUID has no zero byte."""
        address = {"pciDomainID": 0, "pciBusID": (0x1A, 0x1B, 0x3D, 0x3D, 0x3E)[ordinal], "pciDeviceID": 0}
        uuid = (b"", b"", b"\x12", b"\x13", bytes(range(1, 18)))[ordinal]
        return {"name": b"NVIDIA Test", "uuid": uuid, "major": 9, "minor": 0, **address}

    runtime = SimpleNamespace(getDeviceCount=lambda: 5, getDeviceProperties=properties)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))  # type: ignore[arg-type]
    seen = set[str]()
    for host in ("a", "b"):
        monkeypatch.setattr(cuda.socket, "gethostname", lambda host=host: host)
        seen |= {gpu.identity for gpu in cuda.visible()}
    assert len(seen) == 2 * 4 + 1 and bytes(range(1, 17)).hex() in seen


class Graph:
    """Says when it is gone."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self.tell = tell

    def __del__(self) -> None:
        self.tell("the graph is gone")


def joined(tell: Callable[[str], object]) -> tuple[cuda.Cuda, Nccl]:
    """A device that has recorded a graph, and the communicator that the graph uses, which tells when it is ended."""

    def communicator(size: int, identity: object, rank: int) -> Any:
        return SimpleNamespace(destroy=lambda: tell("the communicator is ended"))

    library: Any = SimpleNamespace(NcclCommunicator=communicator)
    sys.modules["cupy"] = sys.modules["cupy.cuda"] = SimpleNamespace(nccl=library)  # type: ignore[assignment]
    device = object.__new__(cuda.Cuda)
    device.stream, device.recordings = None, {"a step": cuda._Recording(None, Graph(tell))}
    return device, device.nccl(2, 0, b"identity")


def test_a_communicator_ends_after_the_graphs_that_use_it() -> None:
    code = "from tests.test_device import joined; kept = joined(lambda line: print(line, flush=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=jobs.ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["the graph is gone", "the communicator is ended"], done.stderr
