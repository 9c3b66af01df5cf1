"""The doctor on real ranks: all is well, or the fault is named in ten seconds, with a code that a script can act on."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.test_box import needs_a_box, run_box

SECONDS = 10  # a promise to users
DOCTOR = [sys.executable, "-m", "distconv.doctor"]


def rows(result) -> dict[str, dict[str, Any]]:  # type: ignore[no-untyped-def]
    """The findings that a doctor printed as JSON, by check."""
    return {row["check"]: row for row in map(json.loads, result.stdout.splitlines())}


@pytest.fixture(scope="module", autouse=True)
def for_people() -> list[str]:
    """What two ranks print; the first exchange on a machine compiles for seconds, which is no doctor's fault."""
    return jobs.run(2, "-m", "distconv.doctor").stdout.splitlines()


@pytest.mark.parametrize("ranks", [0, 1, 3])
def test_a_healthy_machine_is_ready(ranks: int) -> None:
    result = jobs.run(ranks, "-m", "distconv.doctor", "--json", seconds=SECONDS)
    found = rows(result)
    assert result.returncode == 0, found
    assert found["verdict"]["found"] == "ready"
    assert f"{max(1, ranks)} on {socket.gethostname()}" in found["launcher"]["found"]
    assert ("right on all ranks" in found["exchange"]["found"]) is (ranks > 1)
    assert ("mpirun" in found) is (ranks == 0)


def test_people_get_a_line_for_each_check_and_a_verdict(for_people: list[str]) -> None:
    *lines, verdict = for_people
    assert verdict == "ready" and all(line.startswith("ok ") for line in lines) and len(lines) > 7


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("__version__ = '1.26.0'", "1.26.0"),
        ("raise ImportError('of another processor')", "cannot be imported (ImportError: of another processor)"),
    ],
)
def test_another_numpy_on_one_rank_is_named(tmp_path: Path, source: str, named: str) -> None:
    (tmp_path / "numpy.py").write_text(source)
    wrong = ["env", f"PYTHONPATH={tmp_path}", *DOCTOR]
    result = jobs.run(None, *jobs.pair(1, wrong, DOCTOR), seconds=SECONDS)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"numpy {named} on rank 1 ({socket.gethostname()})" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("not ready: versions")


@pytest.mark.slow
@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_never_starts_is_named(absent: int) -> None:
    result = jobs.run(None, *jobs.pair(absent, ["sleep", "60"], DOCTOR), seconds=SECONDS)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("distconv: ")]
    assert f"rank {absent} has not come, while rank {1 - absent} on {socket.gethostname()} wait" in line


@pytest.mark.slow
@pytest.mark.parametrize(("loaded", "rank"), [("python", 0), ("llvmlite", 1)])  # before MPI has started, and after it
def test_a_rank_that_hangs_is_named_in_time(rank: int, loaded: str) -> None:
    job = jobs.Job(2, ["-m", "distconv.doctor"])
    jobs.wait_until(lambda: len(job.ranks()) == 2, job)
    name = "OMPI_COMM_WORLD_RANK" if jobs.OPEN_MPI else "PMI_RANK"
    (process,) = [process for process in job.ranks() if process.environ()[name] == str(rank)]
    jobs.wait_until(lambda: loaded in Path(f"/proc/{process.pid}/maps").read_text(), job)
    process.suspend()
    result = job.finish(SECONDS + 2)  # Open MPI's mpirun takes a second itself
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("distconv: ")]
    assert f"rank {rank} is stopped" in line or f"no answer from rank {rank}" in line


needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="only root may mount a small /dev/shm of its own"
)


@pytest.mark.slow
@needs_mounts
@pytest.mark.skipif(jobs.OPEN_MPI, reason="Open MPI goes on without /dev/shm")
@pytest.mark.parametrize(
    ("command", "left", "ranks"), [("doctor", 0, 2), ("train", 16, 2), ("train", 30, 4), ("train", 13, 1)]
)  # MiB
def test_too_small_a_shared_memory_is_one_sentence(tmp_path: Path, command: str, left: int, ranks: int) -> None:
    filled = f"head -c {64 - left}M /dev/zero > /dev/shm/left-by-a-dead-job"
    script = f'mount -t tmpfs -o size=64m tmpfs /dev/shm && {filled} && exec "$@"'
    start = [jobs.MPIRUN, "-n", ranks, sys.executable, "-m", f"distconv.{command}"]
    result = jobs.run(None, "unshare", "--mount", "sh", "-c", script, "sh", *map(str, start), seconds=SECONDS)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("distconv: ")]
    assert f"/dev/shm has {left} MiB left" in line and "--shm-size" in line


REFUSING = """
import ctypes, os, platform, struct, sys
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, EPERM = 38, 22, 2, 1
call = {"x86_64": 310, "aarch64": 270}[platform.machine()]  # process_vm_readv
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, call), (0x06, 0, 0, 0x00050000 | EPERM), (0x06, 0, 0, 0x7FFF0000)]  # BPF
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
pointer = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(program))
libc = ctypes.CDLL(None)
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, pointer, 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.slow
def test_refused_reading_between_ranks_is_named_and_survived(tmp_path: Path) -> None:
    def run(*command: str):  # type: ignore[no-untyped-def]
        """As docker does it by default: the call that MPICH's CMA needs fails."""
        return jobs.run(0, "-c", REFUSING, jobs.MPIRUN, "-n", "2", sys.executable, "-m", *command, seconds=60)

    result = run("distconv.doctor", "--json")
    assert result.returncode == 1
    assert "process_vm_readv" in rows(result)["shared memory"]["found"]
    # A broadcast of the first weights is the message at which MPICH died.
    quick = ("--data", "digits", "--limit-train", "60", "--epochs", "1", "--out", str(tmp_path / "run"))
    result = run("distconv.train", *quick)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@needs_a_box
def test_two_hosts_are_compared_and_a_silent_one_is_named() -> None:
    result = run_box("--", jobs.MPIRUN, "-n", 2, *DOCTOR, "--json")
    found = rows(result)
    assert result.returncode == 0, found
    assert found["launcher"]["found"].endswith("ranks: 1 on h0, 1 on h1")
    assert "messages" in found["exchange"]["found"]

    if jobs.OPEN_MPI:
        return  # the box cannot put two programs on two hosts with it
    result = run_box("--", jobs.MPIRUN, "-n", 1, *DOCTOR, ":", "-n", 1, "sleep", 60)
    assert result.returncode != 0
    assert "rank 1 has not come, while rank 0 on h0 wait" in result.stderr
