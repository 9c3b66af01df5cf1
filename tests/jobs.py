"""Start commands under a real mpirun, with a time limit, and leave no process behind."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
MPIRUN = str(Path(sys.executable).parent / "mpirun")
OPEN_MPI = "Open MPI" in subprocess.run([MPIRUN, "--version"], capture_output=True, text=True).stdout
ENVIRONMENT = {
    **os.environ,
    "DISTCONV_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    # Open MPI refuses root and more ranks than cores unless told otherwise; MPICH knows neither variable.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    # Open MPI's mpirun gives up where one that was killed has had its process id, and has left its folder.
    "PRTE_MCA_prte_tmpdir_base": tempfile.mkdtemp(prefix="mpirun-"),
}
atexit.register(shutil.rmtree, ENVIRONMENT["PRTE_MCA_prte_tmpdir_base"], ignore_errors=True)


class Job:
    """A running command and its descendants. ranks: 0 for Python without mpirun; None: arguments are the command."""

    def __init__(
        self, ranks: int | None, arguments: Sequence[str | Path], flags: Sequence[str] = (), **environment: str
    ) -> None:
        launcher = [MPIRUN, *flags, "-n", str(ranks)] if ranks else []
        python = [] if ranks is None else [sys.executable]
        self.process = subprocess.Popen(
            [*launcher, *python, *map(str, arguments)],
            cwd=ROOT,
            env={**ENVIRONMENT, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ranks(self) -> list[psutil.Process]:
        """The Python processes that the launcher has started."""
        return [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if Path(sys.executable).name in Path(child.name()).name or "python" in child.name()
        ]

    def finish(self, seconds: float) -> subprocess.CompletedProcess[str]:
        """Wait for the end; fails where that takes longer or leaves a process behind."""
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for process in [*psutil.Process(self.process.pid).children(recursive=True), *children]:
                if process.is_running():
                    process.kill()
            self.process.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"still running after {seconds} s\n{out}\n{err}") from None
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive, f"left behind: {alive}"
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, out, err)


def run(
    ranks: int | None, *arguments: str | Path, seconds: float = 60, flags: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `mpirun flags... python arguments...`; see Job. Returns code and output."""
    return Job(ranks, arguments, flags, **environment).finish(seconds)


def pair(bad: int, wrong: Sequence[str], right: Sequence[str]) -> list[str]:
    """The command that starts two ranks, of which rank bad runs another program."""
    first, second = (wrong, right) if bad == 0 else (right, wrong)
    return [MPIRUN, "-n", "1", *first, ":", "-n", "1", *second]


def wait_until(happened: Callable[[], bool], job: Job, seconds: float = 100) -> None:
    """Wait for something that a running job does; fails where the job ends or the time passes without it."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert job.process.poll() is None, f"ended before: {job.process.communicate()}"
        assert time.monotonic() < deadline, f"did not happen within {seconds} s"
        time.sleep(0.01)  # between looks at a file; no event tells of another process's writes
