"""What distconv.launch does when it is asked to stop: by a batch system, by Ctrl-C, or only suspended."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from distconv.supervise import supervisor
from tests import jobs
from tests.stand_in import lines, starts, supervise

REQUESTS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


def waiting(out: Path, play: str) -> jobs.Job:
    """A supervisor whose job waits for signals."""
    job = supervise(out, play)
    jobs.wait_until((out / "waits").exists, job)
    return job


ENDS = [
    ("sys.exit(75)", 75),
    ("finishes()", 0),
    ("sys.exit(0)", 75),  # not done, whatever it says
    ("killed(10)", 75),  # before it could listen
    ("trains(3); killed(11)", 139),
]


@pytest.mark.parametrize(
    ("number", "end", "code"),
    [(number, *ENDS[0]) for number in REQUESTS] + [(signal.SIGTERM, end, code) for end, code in ENDS[1:]],
)
def test_a_request_to_stop_reaches_the_job_once_and_is_no_accident(
    out: Path, number: signal.Signals, end: str, code: int
) -> None:
    job = waiting(out, f"waits(); {end}")
    job.process.send_signal(number)
    if number != signal.SIGINT:  # batch systems repeat themselves
        jobs.wait_until((out / "signals").exists, job)
        job.process.send_signal(number)
    assert job.finish(20).returncode == code
    assert starts(out) == 1
    assert lines(out / "signals") == [{"number": signal.SIGUSR1}]


def test_ctrl_c_on_a_terminal_reaches_the_supervisor_only(out: Path) -> None:
    play = "note('session', own=os.getsid(0) == os.getpid(), stdin=os.path.realpath('/dev/stdin')); finishes()"
    assert supervise(out, play).finish(20).returncode == 0
    assert lines(out / "session") == [{"own": True, "stdin": "/dev/null"}]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_job_at_once_and_leaves_nothing(out: Path) -> None:
    job = waiting(out, "leaves(); waits(); time.sleep(60)")
    job.process.send_signal(signal.SIGINT)
    jobs.wait_until((out / "signals").exists, job)
    with pytest.raises(subprocess.TimeoutExpired):
        job.process.wait(2 * supervisor.ONE_CTRL_C)
    job.process.send_signal(signal.SIGINT)
    assert job.finish(20).returncode == 130
    assert starts(out) == 1 and not psutil.pid_exists(int(str(lines(out / "left")[0]["pid"])))


@pytest.mark.slow
def test_a_supervisor_that_is_suspended_and_goes_on_has_asked_for_nothing(out: Path) -> None:
    """As by Ctrl-Z and fg, for longer than the time between two of its looks."""
    job = waiting(out, "waits(); finishes()")
    job.process.send_signal(signal.SIGSTOP)
    time.sleep(supervisor.LOOK + 1)
    job.process.send_signal(signal.SIGCONT)
    jobs.wait_until(lambda: psutil.Process(job.process.pid).status() == psutil.STATUS_SLEEPING, job)
    assert lines(out / "signals") == []
    (child,) = psutil.Process(job.process.pid).children()
    child.send_signal(signal.SIGUSR1)  # has it finish
    result = job.finish(20)
    assert result.returncode == 0 and "asked to stop" not in result.stderr


@pytest.mark.slow
def test_a_request_to_stop_during_a_pause_acts_at_once(out: Path) -> None:
    job = supervise(out, "killed()")
    assert job.process.stderr is not None
    assert any("in 4 s" in line for line in job.process.stderr)
    job.process.send_signal(signal.SIGTERM)
    assert job.finish(3).returncode == 75
    assert starts(out) == 4
