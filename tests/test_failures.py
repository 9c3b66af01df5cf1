"""What goes wrong ends the job: one clear message, the right exit code, no hang, no process left, nothing lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from distconv.run.folder import find_checkpoints
from tests import jobs
from tests.files import NAMES, small_set, write_set

QUICK = ("--data", "digits", "--limit-train", "150", "--batch-size", "32", "--eval-samples", "40", "--epochs", "2")

FAILING = """
import os, sys
from distconv.process.launched import launcher_rank
from distconv.nn.networks import deepconvnet

class Failing:
    def __init__(self, inner): self.inner = inner
    def shapes(self, shape): return self.inner.shapes(shape)
    def forward(self, x, params, context):
        if context.training and context.step == 3 and launcher_rank() == int(os.environ["FAILING_RANK"]):
            {what}
        return self.inner.forward(x, params, context)

def network(classes): return Failing(deepconvnet(classes))
"""


def fail_on(rank: int, what: str, folder: Path, ranks: int = 3, flags: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
    """A run in which one rank does something bad in its fourth step."""
    (folder / "failing.py").write_text(FAILING.format(what=what))
    arguments = ("-m", "distconv.train", *QUICK, "--model", "failing:network", "--out", folder / "run")
    return jobs.run(ranks, *arguments, flags=flags, PYTHONPATH=str(folder), FAILING_RANK=str(rank))


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_an_exception_on_one_rank_ends_the_job_and_is_told_once(tmp_path: Path, rank: int) -> None:
    result = fail_on(rank, "raise ValueError('the disk is on fire')", tmp_path)
    assert result.returncode != 0
    assert result.stderr.count("Traceback (most recent call last)") == 1
    assert f"rank {rank} of 3 failed and ends the job: ValueError: the disk is on fire" in result.stderr
    report = json.loads((tmp_path / "run" / "errors" / f"rank-{rank}.json").read_text())
    assert report["rank"] == rank and "the disk is on fire" in report["traceback"]
    assert not (tmp_path / "run" / "DONE").exists()


@pytest.mark.slow
def test_an_exception_that_cannot_be_printed_is_told_too(tmp_path: Path) -> None:
    result = fail_on(1, "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})", tmp_path)
    assert result.returncode == 1 and "in forward" in result.stderr
    assert "rank 1 of 3 failed and ends the job: Odd: its text cannot be had" in result.stderr


@pytest.mark.parametrize("what", [pytest.param("sys.exit(0)", marks=pytest.mark.slow), "os.kill(os.getpid(), 11)"])
def test_a_rank_that_leaves_alone_fails_the_job(tmp_path: Path, what: str) -> None:
    result = fail_on(1, what, tmp_path)
    assert result.returncode != 0
    assert not (tmp_path / "run" / "DONE").exists()


@pytest.mark.slow
def test_the_others_end_the_job_where_the_launcher_does_not_see_that_one_is_gone(tmp_path: Path) -> None:
    result = fail_on(
        1, "os._exit(0)", tmp_path, flags=("-disable-auto-cleanup",)
    )  # what MPICH's does now and then by itself
    assert result.returncode != 0
    assert result.stderr.count("distconv: rank 1 of 3 ended without a word, and so ends the job") == 1
    assert not (tmp_path / "run" / "DONE").exists()


LEAVING = """
import os, time
from distconv.comm.start import start
with start() as world:
    if world.rank == 1:
        time.sleep(1)  # the others have no more to do
        os._exit(3)
"""


@pytest.mark.slow
def test_a_rank_that_is_lost_at_the_very_end_is_missed_too() -> None:
    result = jobs.run(3, "-c", LEAVING, flags=("-disable-auto-cleanup",))
    assert result.returncode != 0 and "rank 1 of 3 ended without a word" in result.stderr


def assert_one_sentence(result, code: int, *parts: str) -> None:  # type: ignore[no-untyped-def]
    assert result.returncode == code, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("distconv: "), result.stderr
    for part in parts:
        assert part in lines[0]


def test_bad_data_is_exit_code_65_and_one_sentence(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "data", {**small_set(), NAMES[3]: np.zeros(3, np.uint8)})  # counts differ
    result = jobs.run(2, "-m", "distconv.train", "--data", folder, "--out", tmp_path / "run")
    assert_one_sentence(result, 65, str(folder))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["--batch-size", "2"], 2, ["--batch-size 2 with 3 ranks"]),
        (["--model", "nothing.here:at_all"], 2, ["there is no module nothing"]),
        (["--data", "/there/is/none"], 66, ["/there/is/none"]),
        (["--resume", "/there/is/none"], 66, ["/there/is/none"]),
        (["--out", "/proc/nothing", "--data", "/there/is/none"], 73, ["/proc/nothing"]),  # before anything takes long
    ],
)
def test_a_wrong_flag_is_one_sentence_for_all_ranks(
    tmp_path: Path, arguments: list[str], code: int, parts: list[str]
) -> None:
    where = () if "--out" in arguments else ("--out", tmp_path / "run")
    data = () if "--data" in arguments else ("--data", "digits")
    assert_one_sentence(jobs.run(3, "-m", "distconv.train", *data, *where, *arguments), code, *parts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert jobs.run(2, "-m", "distconv.train", *QUICK, "--out", out).returncode == 0
    return out


def test_a_checkpoint_of_another_run_is_refused_and_kept(finished: Path) -> None:
    before = {path: path.read_bytes() for path in find_checkpoints(finished / "checkpoints")}
    config = (finished / "config.toml").read_text()
    assert_one_sentence(jobs.run(2, "-m", "distconv.train", *QUICK, "--seed", "3", "--out", finished), 78, "seed")
    assert {path: path.read_bytes() for path in find_checkpoints(finished / "checkpoints")} == before
    assert (finished / "config.toml").read_text() == config and (finished / "DONE").exists()


def test_a_folder_with_a_run_is_not_overwritten(finished: Path) -> None:
    result = jobs.run(2, "-m", "distconv.train", *QUICK, "--resume", "never", "--out", finished)
    assert_one_sentence(result, 73, "holds a run already")


def test_ranks_with_different_flags_are_told_so(tmp_path: Path) -> None:
    here = [sys.executable, "-m", "distconv.train", *QUICK, "--out", tmp_path / "run"]
    job = jobs.Job(1, [*here[1:], "--seed", "1", ":", "-n", "1", *here, "--seed", "2"])
    assert_one_sentence(job.finish(30), 78, "rank 1 differs from rank 0")


def test_without_an_mpi_library_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    result = jobs.run(0, "-m", "distconv.train", *QUICK, "--out", tmp_path / "run", MPI4PY_LIBMPI="/there/is/none.so")
    assert_one_sentence(result, 1, "no MPI library can be loaded", "pip install mpich")


def test_a_disk_that_takes_no_more_ends_the_run_with_exit_code_74(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    result = fail_on(0, limit, tmp_path, ranks=1)
    assert_one_sentence(result, 74, "metrics.jsonl cannot be written")


def test_nan_in_the_learning_ends_the_run_and_names_the_rank(tmp_path: Path) -> None:
    arguments = (*QUICK, "--epochs", "9", "--optimizer", "sgd", "--lr", "1e30", "--out", tmp_path / "run")
    result = jobs.run(2, "-m", "distconv.train", *arguments)
    assert result.returncode == 1
    assert "10 steps in a row had a gradient that is not finite" in result.stderr and "smaller --lr" in result.stderr


UNWRITABLE = "a" * 300  # a name that is too long for a file


def test_a_failure_ends_the_job_even_where_nobody_can_hear_of_it() -> None:
    script = 'exec "$@" 2>&-'
    train = [sys.executable, "-m", "distconv.train", *QUICK, "--out", UNWRITABLE]
    assert jobs.run(None, jobs.MPIRUN, "-n", "2", "bash", "-c", script, "bash", *train, seconds=10).returncode == 73


def test_one_rank_that_fails_ends_the_others_even_where_nobody_can_hear_of_it(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING.format(what="raise ValueError"))
    train = [sys.executable, "-m", "distconv.train", *QUICK, "--model", "failing:network", "--out", tmp_path / "run"]
    command = [jobs.MPIRUN, "-n", "2", "bash", "-c", 'exec "$@" 2>/dev/full', "bash", *train]
    assert jobs.run(None, *command, seconds=20, PYTHONPATH=str(tmp_path), FAILING_RANK="1").returncode == 1


@pytest.mark.slow
def test_two_runs_of_the_same_second_have_a_folder_each(tmp_path: Path) -> None:
    train = [sys.executable, "-m", "distconv.train", *QUICK]
    script = 'cd "$1"; shift; "$@" --seed 1 & "$@" --seed 2; wait'
    assert jobs.run(None, "bash", "-c", script, "bash", tmp_path, *train, PYTHONPATH=str(jobs.ROOT)).returncode == 0
    assert len(list((tmp_path / "runs").glob("*/DONE"))) == 2


LATE = """
import sys, time
from types import SimpleNamespace
from distconv.comm import shared_memory, start

world = start.start()  # without `with`, whose end waits for all ranks

MPI = sys.modules["mpi4py.MPI"]

def allocate(*arguments, **named):
    window = MPI.Win.Allocate_shared(*arguments, **named)
    if world.rank == world.size - 1:
        time.sleep(1)
    return window

sys.modules["mpi4py.MPI"] = SimpleNamespace(**{**vars(MPI), "Win": SimpleNamespace(Allocate_shared=allocate)})
shared_memory.share(world.comm, 64)
"""


@pytest.mark.slow
def test_ranks_that_have_their_shared_memory_do_not_leave_before_the_last_one_has_it() -> None:
    assert jobs.run(8, "-c", LATE, seconds=40).returncode == 0  # MPICH hung, with 8 ranks always, with 4 mostly


@pytest.mark.parametrize(("ranks", "rank"), [(3, 0), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_the_exit_code_is_that_of_the_rank_that_fails_alone(tmp_path: Path, ranks: int, rank: int) -> None:
    what = "from distconv.errors import StorageError; raise StorageError('the disk is full')"
    result = fail_on(rank, what, tmp_path, ranks)
    assert result.returncode == 74 and "Traceback" not in result.stderr
