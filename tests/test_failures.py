"""What goes wrong ends the job: one clear message, the right exit code, no hang, no process left, nothing lost."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import sys
import time
from pathlib import Path

import pytest

from distconv.run.checkpoint import find_checkpoints, load_checkpoint
from tests import jobs

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


@pytest.mark.parametrize("rank", [0, 2])
def test_an_exception_on_one_rank_ends_the_job_and_is_told_once(tmp_path: Path, rank: int) -> None:
    result = fail_on(rank, "raise ValueError('the disk is on fire')", tmp_path)
    assert result.returncode != 0
    assert result.stderr.count("Traceback (most recent call last)") == 1
    assert f"rank {rank} of 3 failed and ends the job: ValueError: the disk is on fire" in result.stderr
    report = json.loads((tmp_path / "run" / "errors" / f"rank-{rank}.json").read_text())
    assert report["rank"] == rank and "the disk is on fire" in report["traceback"]
    assert not (tmp_path / "run" / "DONE").exists()


def test_an_exception_that_cannot_be_printed_is_told_too(tmp_path: Path) -> None:
    result = fail_on(1, "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})", tmp_path)
    assert result.returncode == 1 and "in forward" in result.stderr
    assert "rank 1 of 3 failed and ends the job: Odd: its text cannot be had" in result.stderr


def test_a_job_ends_within_five_seconds_of_a_failure(tmp_path: Path) -> None:
    failed_at = tmp_path / "failed-at"
    result = fail_on(1, f"import pathlib; pathlib.Path({str(failed_at)!r}).touch(); raise ValueError", tmp_path)
    assert result.returncode != 0
    assert time.time() - failed_at.stat().st_mtime < 5  # a promise to users, with much room: it takes 0.2 s


@pytest.mark.parametrize("what", ["sys.exit(0)", "sys.exit(7)", "os._exit(3)", "os.kill(os.getpid(), 11)"])
def test_a_rank_that_leaves_alone_fails_the_job(tmp_path: Path, what: str) -> None:
    result = fail_on(1, what, tmp_path)
    assert result.returncode != 0
    assert not (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize("what", ["os._exit(0)", "os._exit(3)"])
def test_the_others_end_the_job_where_the_launcher_does_not_see_that_one_is_gone(tmp_path: Path, what: str) -> None:
    result = fail_on(1, what, tmp_path, flags=("-disable-auto-cleanup",))  # what MPICH's does now and then by itself
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


def test_a_rank_that_is_lost_at_the_very_end_is_missed_too() -> None:
    result = jobs.run(3, "-c", LEAVING, flags=("-disable-auto-cleanup",))
    assert result.returncode != 0 and "rank 1 of 3 ended without a word" in result.stderr


def test_a_mistake_of_a_users_module_keeps_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("import no_such_module_of_mine\n")
    result = jobs.run(
        2,
        "-m",
        "distconv.train",
        *QUICK,
        "--model",
        "wrong:network",
        "--out",
        tmp_path / "run",
        PYTHONPATH=str(tmp_path),
    )
    assert result.returncode != 0 and "no_such_module_of_mine" in result.stderr


def idx_folder(folder: Path, **changed: bytes) -> Path:
    """Four small valid IDX files, but for the ones that are changed (train_images=..., and so on)."""
    folder.mkdir()
    images = struct.pack(">4I", 0x803, 20, 28, 28) + bytes(20 * 28 * 28)
    labels = struct.pack(">2I", 0x801, 20) + bytes(i % 10 for i in range(20))
    for part, prefix in (("train", "train"), ("test", "t10k")):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(changed.get(f"{part}_images", images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(changed.get(f"{part}_labels", labels))
    return folder


LABELS_9 = struct.pack(">2I", 0x801, 19) + bytes(19)
BAD_DATA = {
    "truncated": {"train_images": struct.pack(">4I", 0x803, 20, 28, 28) + bytes(100)},
    "wrong magic": {"test_labels": b"\x00\x00\x0d\x01" + bytes(24)},
    "swapped": {"train_images": struct.pack(">2I", 0x801, 20) + bytes(20)},
    "label out of range": {"train_labels": struct.pack(">2I", 0x801, 20) + bytes([11] * 20)},
    "counts differ": {"test_labels": LABELS_9},
    "empty file": {"test_images": b""},
    "damaged gzip": {"train_labels": gzip.compress(bytes(100))[:-9]},
}


def assert_one_sentence(result, code: int, *parts: str) -> None:  # type: ignore[no-untyped-def]
    assert result.returncode == code, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("distconv: "), result.stderr
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_exit_code_65_and_one_sentence(tmp_path: Path, case: str) -> None:
    folder = idx_folder(tmp_path / "data", **BAD_DATA[case])
    result = jobs.run(2, "-m", "distconv.train", "--data", folder, "--out", tmp_path / "run")
    assert_one_sentence(result, 65, str(folder))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["--bach-size", "3"], 2, ["--bach-size", "did you mean --batch-size?"]),
        (["--batch-size", "0"], 2, ["--batch-size 0", "from 1"]),
        (["--batch-size", "2"], 2, ["--batch-size 2 with 3 ranks"]),
        (["--lr", "nan"], 2, ["--lr nan", "finite number above 0"]),
        (["--lr", "fast"], 2, ["--lr", "'fast'"]),
        (["--device", "cuda"], 2, ["--device cuda"]),
        (["--model", "nothing.here:at_all"], 2, ["there is no module nothing"]),
        (["--data", "/there/is/none"], 66, ["/there/is/none"]),
        (["--resume", "/there/is/none"], 66, ["/there/is/none"]),
        (["--out", "/proc/nothing"], 73, ["/proc/nothing"]),
        (["--out", "a" * 300], 73, ["aaa"]),
        (["--resume", "a" * 300], 66, ["aaa"]),
        (["--out", "/proc/nothing", "--data", "/there/is/none"], 73, ["/proc/nothing"]),  # before anything takes long
        (["--data", "mnist"], 66, ["DISTCONV_OFFLINE", "DISTCONV_DATA_DIR"]),
    ],
)
def test_a_wrong_flag_is_one_sentence_for_all_ranks(
    tmp_path: Path, arguments: list[str], code: int, parts: list[str]
) -> None:
    where = () if "--out" in arguments else ("--out", tmp_path / "run")
    data = () if "--data" in arguments else ("--data", "digits")
    empty = {"DISTCONV_DATA_DIR": "", "XDG_CACHE_HOME": str(tmp_path)} if "mnist" in arguments else {}
    assert_one_sentence(jobs.run(3, "-m", "distconv.train", *data, *where, *arguments, **empty), code, *parts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert jobs.run(2, "-m", "distconv.train", *QUICK, "--out", out).returncode == 0
    return out


@pytest.mark.parametrize(
    ("change", "named"),
    [(["--model", "simpleconvnet"], "model"), (["--batch-size", "16"], "batch_size"), (["--seed", "3"], "seed")],
)
def test_a_checkpoint_of_another_run_is_refused_and_kept(finished: Path, change: list[str], named: str) -> None:
    before = {path: path.read_bytes() for path in find_checkpoints(finished / "checkpoints")}
    config = (finished / "config.toml").read_text()
    assert_one_sentence(jobs.run(2, "-m", "distconv.train", *QUICK, *change, "--out", finished), 78, named)
    assert {path: path.read_bytes() for path in find_checkpoints(finished / "checkpoints")} == before
    assert (finished / "config.toml").read_text() == config and (finished / "DONE").exists()


def test_a_folder_with_a_run_is_not_overwritten(finished: Path) -> None:
    result = jobs.run(2, "-m", "distconv.train", *QUICK, "--resume", "never", "--out", finished)
    assert_one_sentence(result, 73, "holds a run already")


def test_a_torn_newest_checkpoint_is_passed_over_and_said(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    newest = find_checkpoints(out / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    result = jobs.run(2, "-m", "distconv.train", *QUICK, "--out", out)
    assert result.returncode == 0 and f"passed over: {newest}" in result.stdout
    assert (
        load_checkpoint(newest).tensors.keys()
        == load_checkpoint(find_checkpoints(finished / "checkpoints")[0]).tensors.keys()
    )


def test_ranks_with_different_flags_are_told_so(tmp_path: Path) -> None:
    here = [sys.executable, "-m", "distconv.train", *QUICK, "--out", tmp_path / "run"]
    job = jobs.Job(1, [*here[1:], "--seed", "1", ":", "-n", "1", *here, "--seed", "2"])
    assert_one_sentence(job.finish(30), 78, "rank 1 differs from rank 0")


def test_without_an_mpi_library_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    result = jobs.run(0, "-m", "distconv.train", *QUICK, "--out", tmp_path / "run", MPI4PY_LIBMPI="/there/is/none.so")
    assert_one_sentence(result, 1, "no MPI library can be loaded", "pip install mpich")


def test_an_mpirun_of_another_mpi_does_not_train_the_same_model_many_times(tmp_path: Path) -> None:
    foreign = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "PYTHONWARNINGS": "ignore"}
    result = jobs.run(0, "-m", "distconv.train", *QUICK, "--out", tmp_path / "run", **foreign)
    assert_one_sentence(result, 1, "4 processes", "mpirun")


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


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-"])
def test_a_failure_ends_the_job_even_where_nobody_can_hear_of_it(stderr: str) -> None:
    script = f'exec "$@" {stderr}'
    train = [sys.executable, "-m", "distconv.train", *QUICK, "--out", UNWRITABLE]
    assert jobs.run(None, jobs.MPIRUN, "-n", "2", "bash", "-c", script, "bash", *train, seconds=10).returncode == 73


def test_one_rank_that_fails_ends_the_others_even_where_nobody_can_hear_of_it(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING.format(what="raise ValueError"))
    train = [sys.executable, "-m", "distconv.train", *QUICK, "--model", "failing:network", "--out", tmp_path / "run"]
    command = [jobs.MPIRUN, "-n", "2", "bash", "-c", 'exec "$@" 2>/dev/full', "bash", *train]
    assert jobs.run(None, *command, seconds=20, PYTHONPATH=str(tmp_path), FAILING_RANK="1").returncode == 1


def test_a_run_needs_no_standard_error(tmp_path: Path) -> None:
    train = [sys.executable, "-m", "distconv.train", *QUICK, "--out", tmp_path / "run"]
    assert jobs.run(None, "bash", "-c", 'exec "$@" 2>&-', "bash", *train).returncode == 0
    assert (tmp_path / "run" / "DONE").exists()


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


def test_ranks_that_have_their_shared_memory_do_not_leave_before_the_last_one_has_it() -> None:
    assert jobs.run(8, "-c", LATE, seconds=40).returncode == 0  # MPICH hung, with 8 ranks always, with 4 mostly


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("ranks", [3, 4])
def test_the_exit_code_is_that_of_the_rank_that_fails_alone(tmp_path: Path, ranks: int, rank: int) -> None:
    what = "from distconv.errors import StorageError; raise StorageError('the disk is full')"
    result = fail_on(rank, what, tmp_path, ranks)
    assert result.returncode == 74 and "Traceback" not in result.stderr
