"""A job that is killed leaves nothing in /dev/shm, and the next one sweeps what it could not help leaving."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distconv.process.leftovers import sweep
from tests import jobs

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="only root mounts a /dev/shm")
of_mpich = pytest.mark.skipif(jobs.OPEN_MPI, reason="the daemon of Open MPI removes what its ranks leave")
of_open_mpi = pytest.mark.skipif(not jobs.OPEN_MPI, reason="MPICH's ranks have no names there any more")

ENDING = """
import os
from distconv.comm.start import start
from distconv.comm.shared_memory import share
world = start()
assert share(world.comm, 4096) is not None
world.comm.Split(world.rank % 2).allgather(bytes(100_000))
world.comm.Barrier()
{ending}
world.comm.Barrier()
"""
KILLED = "os.kill(os.getpid(), 9)"


def in_a_small_shared_memory(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script with a /dev/shm of 32 MB of its own, which is nearly what two ranks ask for."""
    mount = "mount -t tmpfs -o size=32m tmpfs /dev/shm\n"
    return jobs.run(None, "unshare", "--mount", "sh", "-c", mount + script, "sh", *arguments, seconds=120)


def job(ending: str) -> list[str]:
    return [jobs.MPIRUN, "-n", "2", sys.executable, "-c", ENDING.format(ending=ending)]


@of_mpich
@pytest.mark.parametrize("ending", ["world.comm.Abort(5)", KILLED, f"if world.rank == 1: {KILLED}", "raise ValueError"])
def test_a_job_that_does_not_end_well_leaves_nothing(ending: str) -> None:
    result = in_a_small_shared_memory('"$@" > /dev/null && echo ended well; ls /dev/shm', *job(ending))
    assert result.stdout == "", result.stderr


@of_mpich
def test_a_job_that_ends_well_misses_nothing() -> None:
    result = in_a_small_shared_memory('"$@"; echo $?; ls /dev/shm', *job(""))
    assert (result.stdout, result.stderr) == ("0\n", "")


@of_mpich
@pytest.mark.slow
def test_a_loop_of_aborted_jobs_does_not_fill_a_small_shared_memory() -> None:
    result = in_a_small_shared_memory('for n in $(seq 20); do "$@"; done; true', *job("world.comm.Abort(5)"))
    assert "MiB left" not in result.stderr and result.stderr.count("application called MPI_Abort") >= 20


@of_mpich
def test_what_a_job_leaves_that_was_killed_while_mpi_started_is_swept_by_the_next() -> None:
    first = [jobs.MPIRUN, "-n", "1", sys.executable, "-c", "from mpi4py import MPI"]
    second = ["sh", "-c", "until ls /dev/shm/mpich_*; do sleep 0.05; done; kill -9 $$"]
    script = '"$@" > /dev/null 2>&1; ls /dev/shm | wc -l; $NEXT; ls /dev/shm'
    script = script.replace("$NEXT", f"{sys.executable} -c 'from distconv.comm.start import start; start()'")
    assert in_a_small_shared_memory(script, *first, ":", "-n", "1", *second).stdout == "1\n"


@of_open_mpi
def test_what_a_job_leaves_whose_daemon_was_killed_is_swept_by_the_next() -> None:
    command = f"{jobs.MPIRUN} -n 2 {sys.executable} -c 'from distconv.comm.start import start; start()'"
    script = f'"$@" > /dev/null; ls /dev/shm | wc -l; {command}; ls /dev/shm'
    killing = f"world.comm.Barrier(); world.rank or os.kill(os.getppid(), 9); {KILLED}"
    assert in_a_small_shared_memory(script, *job(killing)).stdout == "2\n"


MAPPING = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["mpich_shm_7_", "sm_segment.node.0.7.", "vader_segment.node.0.7.", "ucx_shm_posix_7"])
def test_the_segments_of_living_jobs_are_not_swept(tmp_path: Path, name: str) -> None:
    alive, dead, foreign = (tmp_path / each for each in (f"{name}0", f"{name}1", "notes.txt"))
    for path in (alive, dead, foreign):
        path.write_bytes(bytes(4096))
    # The numbers of its processes mean nothing here, as those of a container.
    command = ["unshare", "--pid", "--fork", sys.executable, "-c", MAPPING, str(alive)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "mapped\n"
        sweep(tmp_path)
        assert set(tmp_path.iterdir()) == {alive, foreign}
        process.communicate(timeout=20)
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [foreign]
