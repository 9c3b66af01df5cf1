"""Who does not live, and who does not come on, is told; an undisturbed job is left alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from distconv.comm.world import World
from distconv.monitor import watch
from distconv.monitor.judge import LEAST, PATIENCE, TIMES, Judge, behind
from distconv.monitor.whereabouts import PLACES, Entry

LOOK = 0.5
HOSTS = ("a", "a", "b")


def entries(*places: str, step: int = 7, beats: int = 1, moves: int = 1) -> list[Entry]:
    """One for each place, of ranks 0, 1, ..."""
    return [Entry(rank, 100 + rank, -1, PLACES.index(at), beats, moves, 0, step) for rank, at in enumerate(places)]


def looks(
    judge: Judge, seconds: float, scene: Callable[[int], tuple[list[Entry], list[list[Entry]]]]
) -> tuple[float, str]:
    """What the judge says, and after how many seconds; scene gives the entries of the n-th look."""
    for n in range(round(seconds / LOOK)):
        if sentence := judge.judge(*scene(n), LOOK):
            return n * LOOK, sentence
    return seconds, ""


@pytest.mark.parametrize(
    ("places", "last"),
    [
        (("exchange", "compute", "exchange"), [1]),
        (("save", "exchange", "exchange"), [1, 2]),
        (("exchange", "exchange"), [0, 1]),
    ],
)
def test_those_behind_are_those_for_whom_the_others_wait(places: tuple[str, ...], last: list[int]) -> None:
    assert [entry.rank for entry in behind(entries(*places))] == last
    late = entries("save", "exchange")
    late[1].step += 1  # the others are at the next step already
    assert [entry.rank for entry in behind(late)] == [0]


def test_a_rank_without_a_sign_of_life_is_named_by_the_first_of_the_others() -> None:
    def scene(n: int) -> tuple[list[Entry], list[list[Entry]]]:
        near = entries("exchange", "compute", "exchange", beats=n)
        near[0].beats = 3  # it has stopped
        return near, []

    after, sentence = looks(Judge(1, HOSTS), 2 * LEAST, scene)
    assert LEAST <= after <= LEAST + 2 and "rank 0 of 3 on a (exchange, step 8) gave no sign of life" in sentence
    later, sentence = looks(Judge(2, HOSTS), 2 * LEAST, scene)
    assert after + 1 < later < after + 4 and "rank 0 of 3" in sentence  # should the first fail to


def test_a_host_without_a_sign_of_life_is_named() -> None:
    def scene(n: int) -> tuple[list[Entry], list[list[Entry]]]:
        near, far = entries("exchange", "exchange", beats=n), entries("exchange", "exchange", "compute")[2:]
        return near, [far]

    after, sentence = looks(Judge(0, HOSTS), 2 * LEAST, scene)
    assert LEAST <= after <= LEAST + 3 and "rank 2 of 3 on b (compute, step 8) gave no sign of life" in sentence
    _, sentence = looks(Judge(0, HOSTS), 2 * LEAST, lambda n: (entries("exchange", beats=n), [[]]))
    assert "a host that was never heard of" in sentence


def standing(judge: Judge, place: str, moving: int, seconds: float) -> tuple[float, str]:
    """A job that moves for some looks, and then stands at a place, all its threads alive."""
    return looks(judge, seconds, lambda n: (entries(place, place, beats=n, moves=min(n, moving)), []))


def test_a_rank_that_lives_but_stands_still_is_named_after_the_seconds_that_were_asked_for() -> None:
    judge = Judge(0, HOSTS)
    judge.limit = judge.moves_limit = 5.0

    def scene(n: int) -> tuple[list[Entry], list[list[Entry]]]:
        everyone = entries("exchange", "compute", "exchange", beats=n)
        return everyone[:2], [everyone[2:]]

    after, sentence = looks(judge, 60, scene)
    assert 5 <= after <= 8 and "rank 1 of 3 on a (compute, step 8) did not come on" in sentence
    assert standing(Judge(1, HOSTS), "compute", 0, 1000)[1] == ""  # only rank 0 sees all


@pytest.mark.parametrize(
    ("place", "moving", "limit"),
    [
        ("compute", 20, LEAST),
        ("compute", 0, PATIENCE),
        ("compile", 0, PATIENCE),
        ("save", 20, PATIENCE),  # a disk may be slow
        ("end", 20, PATIENCE),
    ],
)
def test_without_a_wish_a_rank_may_stand_as_befits_the_place(place: str, moving: int, limit: float) -> None:
    judge = Judge(0, HOSTS)
    judge.moves_limit = 0.0
    after, sentence = standing(judge, place, moving, 2 * PATIENCE)
    assert "did not come on" in sentence and limit <= after - moving * LOOK <= limit + 3


def test_a_download_may_take_its_time() -> None:
    judge = Judge(0, HOSTS)
    judge.moves_limit = 5.0
    assert standing(judge, "download", 0, 3 * PATIENCE)[1] == ""


def test_slow_steps_make_the_limit_longer() -> None:
    judge, step = Judge(0, HOSTS), 40.0
    judge.moves_limit = 0.0
    moves = round(step / LOOK)
    _, sentence = looks(judge, 10 * step, lambda n: (entries("compute", beats=n, moves=n // moves), []))
    assert sentence == "" and judge.longest == pytest.approx(step, abs=2 * LOOK)
    frozen = looks(judge, 2 * TIMES * step, lambda n: (entries("compute", beats=n, moves=99), []))
    assert frozen[0] == pytest.approx(TIMES * step, rel=0.02)


def test_nobody_is_told_of_while_nothing_was_demanded() -> None:
    assert standing(Judge(0, HOSTS), "start", 0, 5 * PATIENCE)[1] == ""


class Table:
    """A place for one rank, which shares memory with none."""

    ending, memory = 0, b""

    def __init__(self) -> None:
        self.entries = entries("start")
        self.own = self.entries[0]


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Three that end when their standard input does."""
    command = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]
    three = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(3)]
    yield three
    for process in three:
        process.communicate()


def watcher(processes: list[subprocess.Popen[bytes]], told: Queue[Any], lost: Any = None) -> watch.Watch:
    def end(code: int) -> None:
        watching.over.set()
        told.put(code)

    ids = {10 + n: process.pid for n, process in enumerate(processes)}
    lost = lost or (lambda *ranks: told.put(ranks))
    watching = watch.Watch(Table(), None, Judge(0, HOSTS), ids, lost, told.put, end)  # type: ignore[arg-type]
    return watching


def test_the_ended_and_the_living_are_told(monkeypatch: pytest.MonkeyPatch, processes) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(watch, "GRACE", 0)
    told: Queue[Any] = Queue()
    watcher(processes, told)
    processes[1].kill()
    assert told.get(timeout=20) == ([11], [10, 12])
    assert told.get(timeout=20) == 1


def test_one_that_has_ended_before_is_told_and_hides_no_other(monkeypatch: pytest.MonkeyPatch, processes) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(watch, "GRACE", 0)
    told: Queue[Any] = Queue()
    processes[0].communicate()  # which waits for its end
    watcher(processes, told)
    assert told.get(timeout=20) == ([10], [11, 12])


def test_the_job_ends_where_nobody_can_watch_it(
    monkeypatch: pytest.MonkeyPatch,
    processes,  # type: ignore[no-untyped-def]
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(watch, "GRACE", 0)
    told: Queue[Any] = Queue()
    watcher(processes, told, lambda ended, alive: 1 // 0)
    processes[0].kill()
    assert told.get(timeout=20) == 1
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_ranks_that_are_gone_are_told_where_the_folder_of_the_run_cannot_be_looked_at(
    capfd: pytest.CaptureFixture[str],
) -> None:
    unreadable = Path("x" * 300)  # as on a disk that is gone, to ask for it is an error
    told: Any = SimpleNamespace(rank=0, size=2, error_folder=unreadable)
    World._lost(told, [1], [])
    assert capfd.readouterr().err == "distconv: rank 1 of 2 ended without a word, and so ends the job\n"
