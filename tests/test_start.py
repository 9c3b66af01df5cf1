"""A rank that fails before MPI starts ends the job within ten seconds: it is named, with its reason, once."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests import jobs
from tests.test_failures import QUICK

SECONDS = 10  # a promise to users
# What is wrong on one rank: in its environment, on its command line; then the exit code, 0 where the launcher gives one
# of its own, and a part of what is said.
WAYS = {
    "no MPI library": ({"MPI4PY_LIBMPI": "/there/is/none.so"}, [], 0, "no MPI library can be loaded"),
    "a missing --config": ({}, ["--config", "/there/is/none.toml"], 66, "/there/is/none.toml cannot be read"),
    "an unknown flag": ({}, ["--bach-size", "3"], 2, "did you mean --batch-size?"),
    "an ImportError": ({"mpi4py": "import no_such_module"}, [], 0, "No module named 'no_such_module'"),
    "sys.exit": ({"mpi4py": "import sys; sys.exit('no licence')"}, [], 0, "no licence"),
    "an exception": ({"mpi4py": "raise ValueError('of two minds')"}, [], 0, "of two minds"),
    "a broken NumPy": ({"numpy": "raise ImportError('of another processor')"}, [], 1, "of another processor"),
}


def broken_module(folder: Path, name: str, source: str) -> str:
    (folder / f"{name}.py").write_text(source + "\n")
    return f"PYTHONPATH={folder}"


def spoken(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("distconv: ")]


def one_line(stderr: str) -> str:
    """The only line that distconv has spoken."""
    lines = spoken(stderr)
    assert len(lines) == 1, stderr
    return lines[0]


@pytest.mark.parametrize(
    ("way", "bad"),
    [
        pytest.param(way, bad, marks=() if bad == number % 2 else pytest.mark.slow)
        for number, way in enumerate(WAYS)
        for bad in (0, 1)
    ],
)
def test_a_rank_that_fails_early_is_named_with_its_reason(tmp_path: Path, way: str, bad: int) -> None:
    wrong, arguments, code, reason = WAYS[way]
    environment = [
        f"{name}={text}" if name.isupper() else broken_module(tmp_path, name, text) for name, text in wrong.items()
    ]
    train = [sys.executable, "-m", "distconv.train", *QUICK, "--out", str(tmp_path / "run")]
    result = jobs.run(None, *jobs.pair(bad, ["env", *environment, *train, *arguments], train), seconds=SECONDS)
    assert result.returncode == code if code else result.returncode != 0
    line = one_line(result.stderr)
    assert f"rank {bad} of 2" in line and reason in line
    if way != "a broken NumPy":  # which is met when MPI runs
        assert f"on {socket.gethostname()}: " in line and "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(jobs.OPEN_MPI, reason="its mpirun says so itself, but hangs if rank 0 ends in the wrong moment")
@pytest.mark.parametrize("bad", [0, 1])
def test_a_rank_that_never_was_python_is_missed(bad: int) -> None:
    train = [sys.executable, "-m", "distconv.train", *QUICK]
    result = jobs.run(None, *jobs.pair(bad, ["sh", "-c", "exit 3"], train), seconds=SECONDS)
    assert result.returncode != 0
    line = one_line(result.stderr)
    assert f"rank {bad} of 2 ended before MPI had started" in line


def test_what_all_ranks_do_wrong_is_told_once_and_of_nobody() -> None:
    result = jobs.run(3, "-m", "distconv.evaluate", "--bogus", seconds=SECONDS)
    assert result.returncode == 2
    line = one_line(result.stderr)
    assert "rank" not in line


def test_a_launcher_of_another_library_does_not_start_many_runs_of_one_rank(tmp_path: Path) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}
    result = jobs.run(0, "-m", "distconv.train", *QUICK, "--out", tmp_path / "run", seconds=SECONDS, **step)
    assert result.returncode == 1 and not (tmp_path / "run").exists()
    line = one_line(result.stderr)
    assert "started 4 processes" in line and ("--mpi=pmix" if jobs.OPEN_MPI else "--mpi=pmi2") in line
    other = {**step, "SLURM_PROCID": "3"}
    assert not spoken(jobs.run(0, "-m", "distconv.train", *QUICK, seconds=SECONDS, **other).stderr)
