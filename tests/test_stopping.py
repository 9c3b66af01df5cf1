"""A stop asked for at any time: one request however often it is signalled, and at once where nothing can be lost."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from distconv.run.folder import find_checkpoints
from tests import jobs

LONG = (
    "--data",
    "digits",
    "--batch-size",
    "100",
    "--epochs",
    "500",
    "--checkpoint-seconds",
    "600",
    "--eval-samples",
    "9",
)
# To its mpirun; Open MPI's kills the ranks a quarter of a second after SIGTERM or Ctrl-C.
STOPS = [signal.SIGUSR1] if jobs.OPEN_MPI else [signal.SIGTERM, signal.SIGUSR1]


def training(out: Path) -> jobs.Job:
    """A run that has made its first step."""
    job, metrics = jobs.Job(2, ["-m", "distconv.train", *LONG, "--out", out]), out / "metrics.jsonl"
    jobs.wait_until(lambda: metrics.exists() and '"step"' in metrics.read_text(), job)
    return job


@pytest.mark.parametrize("number", STOPS)
def test_two_signals_of_one_request_leave_a_checkpoint_and_code_75(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    job = training(out)
    job.process.send_signal(number)
    time.sleep(0.02)  # as Slurm does at a time limit
    job.process.send_signal(number)
    result = job.finish(20)
    assert result.returncode == 75, result.stderr
    assert "stopped on request after step" in result.stdout
    assert len(find_checkpoints(out / "checkpoints")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPS)
def test_a_stop_during_the_first_compilation_acts_within_five_seconds(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    job = jobs.Job(2, ["-m", "distconv.train", *LONG, "--out", out], NUMBA_CACHE_DIR=str(tmp_path))
    jobs.wait_until(lambda: any(tmp_path.rglob("*.nbc")), job)  # the first of some twenty kernels
    asked = time.monotonic()
    job.process.send_signal(number)
    result = job.finish(20)
    assert time.monotonic() - asked < 5  # a promise to users
    assert result.returncode == 75, result.stderr
    assert result.stderr.count("stopped on request before the first step") == 1
    assert not (out / "DONE").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    jobs.OPEN_MPI, reason="its mpirun ends the job by itself, or hangs, if a rank ends before another starts"
)
def test_a_stop_of_a_rank_that_waits_for_the_others_ends_the_job(tmp_path: Path) -> None:
    train = [sys.executable, "-m", "distconv.train", *LONG, "--out", str(tmp_path / "run")]
    late = ["sh", "-c", f"sleep 3; exec {' '.join(train)}"]
    job = jobs.Job(None, jobs.pair(1, late, train))
    jobs.wait_until(lambda: any("libmpi" in maps(rank.pid) for rank in job.ranks()), job)
    (waiting,) = job.ranks()
    waiting.send_signal(signal.SIGTERM)
    result = job.finish(20)
    # 75 if the launcher knew of the rank already, else that of the signal by which the late rank ends.
    assert result.returncode != 0 and not (tmp_path / "run").exists()
    assert "stopped on request before the first step" in result.stderr


def maps(process: int) -> str:
    """What a process has loaded; nothing once it has ended."""
    path = Path(f"/proc/{process}/maps")
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_that_is_repeated_until_the_end_changes_nothing(tmp_path: Path, number: signal.Signals) -> None:
    job = training(tmp_path / "run")

    def ask_again() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            for rank in job.ranks():
                rank.send_signal(number)
        return job.process.poll() is not None

    deadline = time.monotonic() + 20
    while not ask_again() and time.monotonic() < deadline:
        time.sleep(0.02)  # a launcher that repeats itself
    assert job.finish(5).returncode == 75


PERSON = """
import os, signal, sys, time
from distconv.run.stopping import StopRequest
stop = StopRequest()
stop.can_save = True
for number in map(int, sys.argv[1:]):
    os.kill(os.getpid(), number)
print("requested" if stop.requested() else "not", flush=True)
"""


@pytest.mark.parametrize(
    ("signals", "ends_by"),
    [
        ([signal.SIGINT], 0),
        ([signal.SIGINT, signal.SIGINT], signal.SIGINT),  # a person who presses Ctrl-C again means it
        ([signal.SIGTERM] * 3, 0),
        ([signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT], 0),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGINT], signal.SIGINT),
    ],
)
def test_only_a_second_ctrl_c_acts_at_once(signals: list[signal.Signals], ends_by: int) -> None:
    result = jobs.run(0, "-c", PERSON, *(str(int(number)) for number in signals), seconds=20)
    assert result.returncode == -ends_by
    assert ("requested" in result.stdout) is not bool(ends_by)


def test_the_same_request_much_later_acts() -> None:
    later = PERSON.replace("stop.can_save", "import distconv.run.stopping as s; s.ONE_REQUEST = 0.0; stop.can_save")
    result = jobs.run(0, "-c", later, str(int(signal.SIGTERM)), str(int(signal.SIGTERM)), seconds=20)
    assert result.returncode == -signal.SIGTERM
