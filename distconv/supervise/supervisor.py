"""A job that is started again after an accident, from its last checkpoint, for as long as that makes sense.

What decides is on disk: metrics.jsonl says how far the run has come, checkpoints/ from where it would go on, errors/
why a rank has failed, and DONE that nothing is left to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distconv import errors
from distconv.formatting import plural
from distconv.process.voice import write
from distconv.run.folder import find_checkpoints, step_of
from distconv.run.log import is_ours, read_metrics
from distconv.supervise.launcher import end, job_environment

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EVENTS = (*REQUESTS, signal.SIGCHLD)
FINAL = (  # a mistake stays one, however often it is repeated; who has asked for a stop decides what comes then
    errors.UsageError.exit_code,
    errors.BadDataError.exit_code,
    errors.MissingInputError.exit_code,
    errors.DownloadError.exit_code,
    errors.CannotCreateError.exit_code,
    errors.MismatchError.exit_code,
    errors.STOPPED,
)
KILLERS = (
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGILL,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGKILL,
    signal.SIGUSR1,
    signal.SIGSEGV,
    signal.SIGALRM,
    signal.SIGTERM,
)
LONGEST_PAUSE = 30.0  # seconds
LOOK = 2.0  # seconds between two looks whether a job has failed that does not end
ONE_CTRL_C = 0.5  # seconds within which another SIGINT is the same: a wrapper may pass on what the terminal sends, too
SECONDS_AFTER_A_REPORT = 20.0  # that a job has to end
TAIL = 1 << 16  # bytes at the end of metrics.jsonl that hold its last record
SET_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Failure:
    """How a start ended. code: of mpirun; step: the last in metrics.jsonl; report: of the rank that failed first."""

    code: int
    step: int
    report: Mapping[str, Any] | None

    def __str__(self) -> str:
        if self.report and self.report.get("cause"):
            return str(self.report["cause"])
        if self.report:
            return f"rank {self.report['rank']} on {self.report['host']} failed: {self.report['error']}"
        if self.code == 0:
            return "the job ended with exit code 0, but without DONE"
        by = f" ({killer.name})" if (killer := killed_by(self.code)) else ""
        return f"the job ended with exit code {self.code}{by}"


class Supervisor:
    """Brings a job, which writes into the folder `out`, to its end over accidents.

    command: the words that start it, for the number of restarts, the step of the newest checkpoint, 0 for none, and how
    many ranks are missing. restarts: so many in a row may bring no new checkpoint. spare: ranks that may be missing,
    one more with each restart that brings none.

    From its creation on, this process takes the signals that ask for a stop here only, and adopts what a job leaves.
    """

    def __init__(
        self, command: Callable[[int, int, int], Sequence[str]], out: Path, restarts: int, spare: int = 0
    ) -> None:
        self.command, self.out, self.most_in_vain, self.spare = command, out, restarts, spare
        self.metrics = out / "metrics.jsonl"
        self.began = time.monotonic()
        self.restarts = 0
        self.asked: list[int] = []  # the signals that have asked for a stop
        self.first_record = last_record(self.metrics)
        self.starts_before = len(_starts(read_metrics(self.metrics)))
        # Blocked signals wait until they are taken, so none is lost between a look at the job and the wait for its end.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, EVENTS)
        LIBC.prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def run(self) -> int:
        """Start the job as often as it takes; returns the exit code."""
        in_vain, previous = 0, None
        checkpoint = self.newest_checkpoint()
        while True:
            old_reports = self.reports()
            missing = min(in_vain, self.spare)
            code = self.start(self.command(self.restarts, checkpoint, missing))
            if code in FINAL or self.asked or (code in (0, 1) and self.is_done()):
                return code
            failure = Failure(code, _step(last_record(self.metrics)), self.first_report(old_reports))
            if previous and self.would_fail_again(previous, failure, missing == self.spare):
                where = f"its report is in {self.out / 'errors'}" if failure.report else "why stands above"
                write(f"{failure}, twice in a row after step {failure.step:,}: given up; {where}")
                return code or 1
            before, checkpoint = checkpoint, self.newest_checkpoint()
            in_vain = 0 if checkpoint > before else in_vain + 1
            if in_vain > self.most_in_vain:
                write(f"{failure}: given up after {self.most_in_vain} restarts in a row without a new checkpoint")
                return code or 1
            self.restarts += 1
            pause = min(2.0 ** (in_vain - 2), LONGEST_PAUSE) if in_vain > 1 else 0.0
            when = f"in {pause:.0f} s " if pause else ""
            where = f"step {checkpoint:,}" if checkpoint else "the beginning"
            if missing := min(in_vain, self.spare):
                where += f", with {plural(missing, 'rank')} fewer"
            write(f"{failure}, after step {failure.step:,}; restart {self.restarts} {when}from {where}")
            if self.asked_within(pause):
                return errors.STOPPED
            previous = failure

    def start(self, command: Sequence[str]) -> int:
        """One job to its end; returns its exit code. Raises DistconvError where it cannot be started."""
        before = last_record(self.metrics)
        try:
            process = subprocess.Popen(
                command,
                env=job_environment(),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C on a terminal would reach mpirun, too
                preexec_fn=_tie_to(os.getpid()),
            )
        except OSError as error:
            raise errors.DistconvError(f"{command[0]} cannot be started: {error.strerror}") from None
        code = self.attend(process)
        end_leftovers()
        if self.asked.count(signal.SIGINT) > 1:
            return code
        last = last_record(self.metrics)
        recorded = last != before
        if code == signal.SIGINT and recorded:
            code += 128  # MPICH's mpirun gives the bare number of a signal; as a usage error, 2 comes before any record
        if code == errors.STOPPED and not self.asked and not (recorded and last.get("event") == "stop"):
            # A launcher ends all ranks by SIGTERM where one has failed, and takes the code of those that obey.
            return 128 + signal.SIGTERM
        unheard = killed_by(code) and not recorded  # asked before the ranks could listen
        if self.asked and (unheard or code == 0) and not self.is_done():
            return errors.STOPPED
        return code

    def attend(self, process: subprocess.Popen[Any]) -> int:
        """Pass requests to stop on to a job until it ends; returns its exit code, as a shell would give it."""
        old_reports, failed_at, interrupted = self.reports(), math.inf, -math.inf
        while process.poll() is None:
            event, now = next_event(LOOK), time.monotonic()
            if event is None and (report := self.first_report(old_reports)):
                failed_at = min(failed_at, now)
                if now - failed_at > SECONDS_AFTER_A_REPORT:
                    # Open MPI's mpirun waits for the daemon of a host that is gone, though its ranks have ended.
                    end(process)
                    return int(report.get("exit_code") or 1)
            if event not in REQUESTS:
                continue
            if event == signal.SIGINT:
                again, interrupted = now - interrupted < ONE_CTRL_C, now
                if again:
                    continue  # the same one, on two ways
            self.asked.append(event)
            if len(self.asked) == 1:
                process.send_signal(signal.SIGUSR1)  # every launcher passes this one on, and no other
                write("the job is asked to stop, with a checkpoint; a second Ctrl-C ends it at once")
            if self.asked.count(signal.SIGINT) == 2:
                end(process)
                return 128 + signal.SIGINT
        return process.returncode if process.returncode >= 0 else 128 - process.returncode

    def asked_within(self, seconds: float) -> bool:
        """Wait so long, or until a request to stop; whether there was one."""
        until = time.monotonic() + seconds
        while True:
            event = next_event(max(0.0, until - time.monotonic()))
            if event in REQUESTS:
                return True
            if event is None and time.monotonic() >= until:
                return False

    def would_fail_again(self, previous: Failure, failure: Failure, alike: bool) -> bool:
        """Whether two failures in a row have one cause, rather than being two accidents: the same report and step.

        Or the same exit code without a report, if it is that of no signal, before any start has come as far as a step:
        so end a mistake in a user's model or in --mpirun, and an output that cannot be written. alike: the next start
        would have as many ranks; with fewer, there may be room for each.
        """
        if not alike:
            return False
        if previous.report and failure.report:
            return (previous.report["error"], previous.step) == (failure.report["error"], failure.step)
        return previous.code == failure.code and not killed_by(failure.code) and not self.has_trained()

    def has_trained(self) -> bool:
        """Whether a start has come as far as a step."""
        return _step(last_record(self.metrics)) != _step(self.first_record)

    def newest_checkpoint(self) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        with contextlib.suppress(OSError, ValueError):
            return max(map(step_of, find_checkpoints(self.out / "checkpoints")), default=0)
        return 0

    def is_done(self) -> bool:
        return last_record(self.metrics).get("event") == "final" and (self.out / "DONE").exists()

    def reports(self) -> dict[Path, int]:
        """The reports of failed ranks, each with the time when it was written."""
        with contextlib.suppress(OSError, ValueError):
            return {path: path.stat().st_mtime_ns for path in (self.out / "errors").glob("rank-*.json")}
        return {}

    def first_report(self, old: Mapping[Path, int]) -> Mapping[str, Any] | None:
        """The first report that is not among old ones, of those that tell the cause if there are any; or None."""
        new = {path: when for path, when in self.reports().items() if old.get(path) != when}
        found = []
        for path in sorted(new, key=lambda path: new[path]):
            with contextlib.suppress(OSError, ValueError):
                report = json.loads(path.read_text())
                if isinstance(report, dict) and report.keys() >= {"rank", "host", "error"}:
                    found.append(report)
        return next((report for report in found if report.get("cause")), found[0] if found else None)

    def summary(self) -> str:
        """How often the job was started again, and how much of the time was lost to what."""
        whole = time.monotonic() - self.began
        useful = min(whole, useful_seconds(read_metrics(self.metrics), self.starts_before))
        return (
            f"{plural(self.restarts, 'restart')}; {whole - useful:,.1f} of {whole:,.1f} s went into "
            f"starts, lost steps and pauses: goodput {useful / whole:.1%}"
        )


def next_event(seconds: float) -> int | None:
    """The number of the next signal of EVENTS, or None where none has come within so many seconds.

    Where this process was stopped (kill -STOP, Ctrl-Z) beyond that time, CPython 3.11 returns a number without meaning.
    """
    event = signal.sigtimedwait(EVENTS, seconds)
    return event.si_signo if event and event.si_signo in EVENTS else None


def killed_by(code: int) -> signal.Signals | None:
    """The signal that an exit code of mpirun tells of: MPICH's gives the bare number, others add 128."""
    return next((killer for killer in KILLERS if code in (killer, 128 + killer)), None)


def last_record(metrics: Path) -> Mapping[str, Any]:
    """The last whole record of a metrics.jsonl, however long that is; an empty one if there is none."""
    with contextlib.suppress(OSError, ValueError), metrics.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError, RecursionError):
                record: Mapping[str, Any] = json.loads(line)
                if is_ours(record):
                    return record
    return {}


def useful_seconds(records: Sequence[Mapping[str, Any]], starts_before: int = 0) -> float:
    """The time that got a run ahead for good: from each start to the last of its records that are still there.

    starts_before: so many of the first starts do not count.
    """
    bounds = [*_starts(records), len(records)][starts_before:]
    times = [float(record.get("time", 0.0)) for record in records]
    return sum(max(0.0, times[end - 1] - times[start]) for start, end in itertools.pairwise(bounds))


def _starts(records: Sequence[Mapping[str, Any]]) -> list[int]:
    return [number for number, record in enumerate(records) if record.get("event") == "start"]


def _step(record: Mapping[str, Any]) -> int:
    return int(record.get("step", record.get("resumed_step", 0)))


def end_leftovers() -> None:
    """Kill all children of this process: what a job has left on this host, as its mpirun is gone."""
    import psutil

    for _ in range(5):  # seconds; a process may hang within the kernel
        left = psutil.Process().children(recursive=True)
        if not left:
            break
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def _tie_to(supervisor: int) -> Callable[[], None]:
    """What a new process does first: it takes signals, and is sent SIGUSR1 where the supervisor dies before it."""

    def tie() -> None:
        LIBC.prctl(SET_DEATH_SIGNAL, signal.SIGUSR1, 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, EVENTS)
        if os.getppid() != supervisor:  # which has died meanwhile
            os._exit(errors.STOPPED)

    return tie
