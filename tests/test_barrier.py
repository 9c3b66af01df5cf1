"""Jobs with more ranks than cores, whose ranks sleep where they wait: they end as all others do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from distconv.comm import barrier as futex
from tests import jobs

QUICK = (
    "--data",
    "digits",
    "--limit-train",
    "300",
    "--batch-size",
    "20",
    "--epochs",
    "200",
    "--checkpoint-seconds",
    "0",
)

WAITING = """
import os, pathlib, signal
from distconv.comm.start import start
from distconv.comm.shared_memory import share

with start() as world:
    barrier = share(world.comm, 64).barrier
    assert type(barrier).__name__ == "Barrier"
    barrier()
    if world.rank == 1:
        {what}
    barrier()
print("over")
"""


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    """What a test starts has one core."""
    if not futex.Barrier.works():
        pytest.skip("no futex here")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.parametrize("what", ["os.kill(os.getpid(), signal.SIGKILL)", "raise ValueError", "os._exit(3)", "exit(0)"])
def test_a_rank_that_ends_ends_those_that_sleep(what: str) -> None:
    result = jobs.run(3, "-c", WAITING.format(what=what))
    assert result.returncode != 0 and "over" not in result.stdout, result.stdout + result.stderr


def test_all_ranks_wake_where_none_ends() -> None:
    assert jobs.run(3, "-c", WAITING.format(what="pass")).stdout.count("over") == 3


def test_a_signal_stops_all_ranks_with_a_checkpoint(tmp_path: Path) -> None:
    job = jobs.Job(3, ("-m", "distconv.train", *QUICK, "--out", tmp_path / "run"))
    log = tmp_path / "run" / "metrics.jsonl"
    jobs.wait_until(lambda: log.exists() and '"step"' in log.read_text(), job)
    job.ranks()[-1].send_signal(signal.SIGTERM)
    stopped = job.finish(30)
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert "stopped on request" in stopped.stdout and list((tmp_path / "run" / "checkpoints").iterdir())


def test_other_systems_are_not_asked_for_a_futex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futex, "SYSTEM_CALL", None)  # as on a processor whose number of the call is not known
    assert not futex.Barrier.works()
    monkeypatch.setattr(futex, "SYSTEM_CALL", 100_000)  # as where the call is forbidden
    assert not futex.Barrier.works()
