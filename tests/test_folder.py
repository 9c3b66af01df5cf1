"""The folder of a run is safe from a second job, and what is not distconv's is safe in it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distconv.config import Config
from distconv.errors import CannotCreateError, StorageError
from distconv.run import folder
from distconv.run.checkpoint import load_checkpoint
from distconv.run.folder import find_checkpoints
from distconv.run.log import RunLog, read_metrics
from distconv.run.saver import Saver
from tests import jobs
from tests.folders import ALONE, events, everything, look, put, run
from tests.test_failures import QUICK, assert_one_sentence
from tests.test_start import one_line
from tests.test_stopping import training

# --- what is not distconv's


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "curves.png", "DONE", "errors/notes.txt"])
def test_a_folder_where_somebody_elses_file_would_be_lost_is_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path / name)
    before = everything(tmp_path)
    with pytest.raises(CannotCreateError, match=name.split("/")[0]):
        look(tmp_path)
    assert everything(tmp_path) == before
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/there/is/none")  # somebody else's, too
    with pytest.raises(CannotCreateError, match=name.split("/")[0]):
        look(tmp_path)


def test_a_log_that_the_shell_has_put_there_does_not_matter(tmp_path: Path) -> None:
    put(tmp_path / "log.txt")
    assert look(tmp_path) is None


def test_the_refusal_is_one_sentence_for_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("mine = true\n")
    result = run(tmp_path, ranks=2)
    line = one_line(result.stderr)
    assert result.returncode == 73 and all(part in line for part in (str(tmp_path), "config.toml", "did not make"))
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_an_out_that_cannot_become_a_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_one_sentence(run(tmp_path / "file"), 73, "Not a directory")
    (tmp_path / "link").symlink_to("/there/is/none")
    assert_one_sentence(
        run(tmp_path / "link"), 73, f"--out '{tmp_path}/link' cannot be written (a file or a broken link"
    )


@pytest.mark.slow
def test_a_run_whose_folder_is_taken_away_ends_and_makes_no_other(tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = jobs.Job(2, ("-m", "distconv.train", *QUICK, "--epochs", "100000", "--out", out))
    jobs.wait_until(lambda: "epoch" in events(out), job)
    out.rename(tmp_path / "moved")
    result = job.finish(30)
    assert result.returncode == 74 and "Traceback" not in result.stderr
    assert "rank 0 of 2 failed and ends the job: " in result.stderr
    assert any(part in result.stderr for part in (f"{out}/checkpoints is gone", "cannot be written"))
    assert not out.exists()


@pytest.mark.slow
def test_a_run_whose_lock_is_removed_ends_before_it_writes_over_another(tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = jobs.Job(2, ("-m", "distconv.train", *QUICK, "--epochs", "100000", "--out", out))
    jobs.wait_until(lambda: "epoch" in events(out), job)
    (out / folder.LOCK).unlink()
    second = run(out, "--epochs", "3")
    result = job.finish(30)
    assert result.returncode == 74 and f"{out / folder.LOCK} is not the file that this job has locked" in result.stderr
    assert second.returncode in (0, 78), second.stderr  # by then the first may have come further than three epochs


def saver(out: Path) -> Saver:
    """Of a run that is about to save its fifth step."""
    data = SimpleNamespace(image_shape=(28, 28, 1), digest="d" * 64, classes=10)
    world = SimpleNamespace(rank=0, at=lambda place: None)
    run: Any = SimpleNamespace(world=world, data=data, config=Config(), skipped=0, diverging=0, step=5)
    for name in (folder.LOCK, "metrics.jsonl"):
        (out / name).touch()
    return Saver(run, out / "checkpoints", "digits", RunLog(False))


def test_a_folder_that_cannot_be_read_any_more_is_one_sentence(tmp_path: Path) -> None:
    saving = saver(tmp_path)
    (tmp_path / folder.LOCK).unlink()
    (tmp_path / folder.LOCK).symlink_to(folder.LOCK)  # as of a disk that is gone, to look at it is an error
    with pytest.raises(StorageError, match=f"{tmp_path} cannot be read: .*symbolic links"):
        saving.save()


# --- one job at a time


@pytest.mark.slow
def test_a_second_job_is_told_who_has_the_folder_and_disturbs_nothing(tmp_path: Path) -> None:
    first = training(tmp_path / "run")
    held_by = (tmp_path / "run" / folder.LOCK).read_text().split()[1]
    assert held_by in {str(rank.pid) for rank in first.ranks()}
    (tmp_path / "link").symlink_to("run")
    second = run(tmp_path / "link", ranks=2)
    line = one_line(second.stderr)
    assert (
        second.returncode == 73 and f"in use by another job (pid {held_by} on {socket.gethostname()} since 20" in line
    )
    first.process.send_signal(signal.SIGUSR1)
    assert first.finish(20).returncode == 75
    steps = [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["event"] == "step"]
    newest = load_checkpoint(find_checkpoints(tmp_path / "run" / "checkpoints")[0])
    assert steps == list(range(1, newest.position["step"] + 1))


def held(out: Path, say: Any = pytest.fail) -> contextlib.AbstractContextManager[Path]:
    return folder.held_folder(Config(out=str(out)), ALONE, say)


def test_a_job_that_has_ended_holds_the_folder_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PATIENCE", 0.0)
    for _ in range(2):  # in one process, as in a notebook
        with held(tmp_path), pytest.raises(CannotCreateError, match=f"pid {os.getpid()} on {socket.gethostname()}"):
            held(tmp_path).__enter__()


HOLDING = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_restart_waits_for_a_killed_job_that_is_still_dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", HOLDING, str(tmp_path / folder.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as dying:
        assert dying.stdout is not None and dying.stdout.readline() == "held\n"

        def die(seconds: float) -> None:
            dying.kill()
            dying.wait()

        monkeypatch.setattr(folder, "time", SimpleNamespace(**{**vars(folder.time), "sleep": die}))
        with held(tmp_path):
            assert dying.returncode == -signal.SIGKILL


def test_a_file_system_without_locks_is_told_once_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(folder, "fcntl", SimpleNamespace(**{**vars(folder.fcntl), "flock": flock}))
    said: list[str] = []
    for job in (1, 2):
        assert look(tmp_path) is None
        with held(tmp_path, said.append):
            assert len(said) == job and os.strerror(errno.ENOLCK) in said[-1]
