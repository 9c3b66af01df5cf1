"""How work on a GPU is recorded, and what happens where it cannot be: a stand-in for CuPy, beside test_gpu.py."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from distconv.kernels import cuda


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
        device.cupy = SimpleNamespace(cuda=SimpleNamespace(MemoryPool=lambda: pool, using_allocator=using_allocator))
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


def test_an_error_of_the_work_itself_ends_the_recording(make_device: Make) -> None:
    device, stream, said = make_device(False)

    def work() -> None:
        if stream.capturing:
            raise ValueError("an operation that cannot be recorded")
        stream.do("kernels")

    for _ in range(3):
        device.replayed("a", work)
    assert stream.log == ["kernels"] * 3 and not stream.capturing
    assert len(said) == 1 and "cannot be recorded" in said[0]


def test_without_cupy_or_a_gpu_there_is_a_reason() -> None:
    try:
        found = cuda.visible()
    except RuntimeError as error:
        assert cuda.NOT_INSTALLED in str(error) or "CUDA finds no GPU" in str(error)
    else:
        assert all(gpu.capability >= 50 for gpu in found)
