"""Start a job of our own: what `launch` does, and `prove` and `bench scaling` to compare numbers of ranks."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distconv.errors import DistconvError, UsageError
from distconv.process.launched import in_a_job, in_an_allocation
from distconv.process.roll_call import own_name_resolves

# Open MPI refuses root and more ranks than cores unless told otherwise; other MPIs know none of these.
ROOT_MAY_RUN = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
MORE_RANKS_THAN_CORES = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
SECONDS_TO_END = 5.0  # that a job gets, before its mpirun is killed


def mpirun() -> str:
    """The mpirun of this Python environment, or else the first on PATH. Raises DistconvError where there is none."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise DistconvError("no mpirun is found: pip install mpich, or load the MPI module of your cluster")
    return found


def refuse_to_nest(command: str) -> None:
    """Raise DistconvError where this process is itself a rank: MPI jobs do not start one another."""
    if in_a_job():
        raise DistconvError(f"{command} starts mpirun by itself: run it without mpirun, on one process")


def end_on_sigterm() -> None:
    """From now on, SIGTERM ends this process as Ctrl-C does: after its job, and what it has made."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def job_starter(command: str | None) -> list[str]:
    """The words that start ranks, to which `-n 4` is appended: command, as `srun --mpi=pmi2`, or else our mpirun.

    Raises UsageError for a command that is not there, DistconvError where there is no mpirun or none can work.
    """
    if command is not None:
        try:
            words = shlex.split(command)
        except ValueError as error:  # an open quote
            raise UsageError(f"--mpirun {command}: {error}; give a command as 'srun --mpi=pmi2'") from None
        if not words or not shutil.which(words[0]):
            raise UsageError(f"--mpirun {command}: there is no such command; give one as 'srun --mpi=pmi2'")
        return words
    if in_an_allocation() and not own_name_resolves():
        raise DistconvError(
            f"this host's own name {socket.gethostname()} has no address, so other hosts cannot answer its mpirun: "
            "put it into /etc/hosts"
        )
    return [mpirun()]


def job_command(starter: Sequence[str], ranks: int, arguments: Sequence[str]) -> list[str]:
    """The words of `python arguments...` on so many ranks."""
    return [*starter, "-n", str(ranks), sys.executable, *arguments]


def job_environment() -> dict[str, str]:
    """This environment, and what an mpirun wants to be told before it starts any ranks that we ask for."""
    # In an allocation, Open MPI would put all ranks on its first host.
    permissions = ROOT_MAY_RUN if in_an_allocation() else ROOT_MAY_RUN | MORE_RANKS_THAN_CORES
    return {**os.environ, **permissions}


def run_job(starter: Sequence[str], ranks: int, arguments: Sequence[str], seconds: float) -> str:
    """Run `python arguments...` on so many ranks and return its standard output.

    Raises DistconvError with what the job said where it fails or takes longer than `seconds`.
    """
    command = job_command(starter, ranks, arguments)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))

    def hear() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        process = subprocess.Popen(
            command,
            env=job_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hear,
        )
    except OSError:
        hear()
        raise
    with process:
        try:
            hear()  # what has come meanwhile, when there is a process that can be ended
            out, err = process.communicate(timeout=seconds)
        except BaseException as error:  # a signal to stop, too
            end(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise DistconvError(f"{' '.join(command)} took more than {seconds:.0f} s and was ended") from None
            raise
    if process.returncode != 0:
        said = err.strip() or out.strip() or "it said nothing"
        raise DistconvError(f"{' '.join(command)} failed with exit code {process.returncode}: {said}")
    return out


def end(process: subprocess.Popen[Any]) -> None:
    """End a job with its ranks, which its mpirun can do only if it is asked to."""
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()


def rows(lines: str, starter: Sequence[str]) -> list[Any]:
    """The JSON objects that a job printed, one a line. Raises DistconvError where it printed others, or none."""
    try:
        found = [json.loads(line) for line in lines.splitlines()]
    except ValueError:
        found = []
    if not found:
        raise DistconvError(f"{shlex.join(starter)} started no ranks of ours, but said: {lines.strip() or 'nothing'}")
    return found
