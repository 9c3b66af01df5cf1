"""Who of the watched processes has ended is told; nothing is, once they may end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from queue import Queue

import pytest

from distconv.comm import watch


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Three that end when their standard input does."""
    command = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]
    three = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(3)]
    yield three
    for process in three:
        process.communicate()


def watcher(processes: list[subprocess.Popen[bytes]], told: Queue[tuple[list[int], list[int]]]) -> watch.Watch:
    return watch.Watch({10 + n: p.pid for n, p in enumerate(processes)}, lambda *ranks: told.put(ranks))


def test_the_ended_and_the_living_are_told(monkeypatch: pytest.MonkeyPatch, processes) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(watch, "GRACE", 0)
    told: Queue[tuple[list[int], list[int]]] = Queue()
    watcher(processes, told)
    processes[1].kill()
    assert told.get(timeout=20) == ([11], [10, 12])


def test_one_that_has_ended_before_is_told_and_hides_no_other(monkeypatch: pytest.MonkeyPatch, processes) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(watch, "GRACE", 0)
    told: Queue[tuple[list[int], list[int]]] = Queue()
    processes[0].communicate()  # which waits for its end
    watcher(processes, told)
    assert told.get(timeout=20) == ([10], [11, 12])


def test_after_stop_nothing_is_told(monkeypatch: pytest.MonkeyPatch, processes) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(watch, "GRACE", 0)
    told: Queue[tuple[list[int], list[int]]] = Queue()
    before = set(threading.enumerate())
    watcher(processes, told).stop()
    (thread,) = set(threading.enumerate()) - before
    processes[0].communicate()
    thread.join(20)
    assert not thread.is_alive() and told.empty()


def test_one_rank_alone_has_no_thread_for_it() -> None:
    before = threading.active_count()
    watcher([], Queue())
    assert threading.active_count() == before
