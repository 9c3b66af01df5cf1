"""The folder of a run is safe: from a second job, from a changed command, and what is not distconv's in it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distconv.config import Config
from distconv.errors import CannotCreateError, MismatchError, MissingInputError
from distconv.run import folder
from distconv.run.checkpoint import find_checkpoints, load_checkpoint
from distconv.run.log import read_metrics
from tests import jobs
from tests.test_failures import QUICK, assert_one_sentence
from tests.test_start import one_line
from tests.test_stopping import training

# What rank 0 needs of a World, where nobody else is.
ALONE: Any = SimpleNamespace(rank=0, together=contextlib.nullcontext, comm=SimpleNamespace(bcast=lambda x: x))


def run(out: Path, *more: str | Path, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    return jobs.run(ranks, "-m", "distconv.train", *QUICK, "--out", out, *more)


def look(out: Path, **changed: Any) -> Any:
    """What a run of these settings sees when it looks at its folder, before it starts."""
    quick = {"data": "digits", "limit_train": 150, "batch_size": 32, "eval_samples": 40, "epochs": 2}
    return folder.check_folder(Config(**{**quick, "out": str(out), **changed}), ALONE)


def everything(path: Path) -> dict[str, tuple[int, bytes]]:
    """What is in a folder: when each file was changed, and its content."""
    return {str(p): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in [path, *path.rglob("*")]}


def events(out: Path) -> list[str]:
    return [record["event"] for record in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs of five steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(out).returncode == 0
    return out


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that may be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


# --- what is not distconv's


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '{"event": "start", "step": 3, "versions": {"another": 1}}\n[1]\n{"versions": 5, "event": "start"}\n'
    )


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


@pytest.mark.slow
def test_what_a_link_leads_to_is_not_written(finished: Path, tmp_path: Path) -> None:
    """One with the name of a file that a run makes for itself."""
    (tmp_path / "theirs").write_text("mine")
    for name in (".config.toml.tmp", ".metrics.jsonl.tmp", ".DONE.tmp"):
        (finished / name).symlink_to(tmp_path / "theirs")
    assert run(finished, "--epochs", "3").returncode == 0
    (finished / folder.LOCK).unlink()
    (finished / folder.LOCK).symlink_to(tmp_path / "theirs")
    assert_one_sentence(run(finished, "--epochs", "4"), 73, folder.LOCK, "symbolic link")
    assert (tmp_path / "theirs").read_text() == "mine"


def test_an_out_that_cannot_become_a_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_one_sentence(run(tmp_path / "file"), 73, "Not a directory")
    (tmp_path / "link").symlink_to("/there/is/none")
    assert_one_sentence(
        run(tmp_path / "link"), 73, f"--out '{tmp_path}/link' cannot be written (a file or a broken link"
    )


@pytest.mark.slow
def test_reports_of_failures_go_but_what_somebody_put_beside_them_is_kept(finished: Path) -> None:
    put(finished / "errors" / "rank-1.json")
    put(finished / "errors" / "notes.txt")
    with pytest.raises(CannotCreateError, match=r"errors/notes\.txt"):
        look(finished, epochs=3)
    assert len(list((finished / "errors").iterdir())) == 2
    (finished / "errors" / "notes.txt").unlink()
    assert run(finished, "--epochs", "3").returncode == 0
    assert not (finished / "errors").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml", "DONE", "curves.png"])
def test_a_pipe_in_place_of_a_file_of_ours_is_refused_and_not_waited_for(finished: Path, name: str) -> None:
    (finished / name).unlink()
    os.mkfifo(finished / name)
    with pytest.raises(CannotCreateError, match=name):
        look(finished)


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


# --- a run that is finished


def test_a_finished_run_asked_again_says_so_and_changes_nothing(finished: Path) -> None:
    before, accuracy = everything(finished), read_metrics(finished / "metrics.jsonl")[-1]["test_accuracy"]
    for target, code in (("0", 0), ("0.99", 1)):
        result = run(finished, "--target-accuracy", target, "--checkpoint-seconds", "9", ranks=2)
        assert result.returncode == code, result.stderr
        assert "is finished" in result.stdout and f"test accuracy {accuracy:.2%}" in result.stdout
        assert ("99.00% was missed" in result.stdout) == bool(code)
    assert everything(finished) == before


def on_a_read_only(folder: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command of a run where a folder cannot be written."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("only root may mount a folder read-only")
    script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    train = [sys.executable, "-m", "distconv.train", *QUICK, "--out", out, *more]
    return jobs.run(None, "unshare", "--mount", "sh", "-c", script, "sh", folder, *train)


@pytest.mark.slow
def test_a_finished_run_on_a_disk_that_cannot_be_written_says_so(finished: Path) -> None:
    result = on_a_read_only(finished, finished)
    assert result.returncode == 0 and "is finished" in result.stdout, result.stderr
    result = on_a_read_only(finished, finished, "--epochs", "3")
    assert_one_sentence(result, 73, str(finished), "cannot be written", "Read-only file system")


def test_checkpoints_that_could_not_be_written_are_found_out_before_any_step(finished: Path) -> None:
    before = events(finished)
    result = on_a_read_only(finished / "checkpoints", finished, "--epochs", "3")
    assert_one_sentence(result, 73, str(finished), "Read-only file system")
    assert events(finished) == before


VAIN = [("lr", 0.5, "lr is now 0.5, was 0.001"), ("epochs", 1, "epochs is now 1, after 2")]


@pytest.mark.parametrize(("setting", "value", "said"), VAIN)
def test_a_change_that_would_train_nothing_is_refused(finished: Path, setting: str, value: Any, said: str) -> None:
    before = everything(finished)
    with pytest.raises(MismatchError, match=said):
        look(finished, **{setting: value})
    assert everything(finished) == before
    (finished / "DONE").unlink()  # as if killed when it had trained, and before it was finished
    (finished / folder.LOCK).unlink()
    before = everything(finished)
    assert_one_sentence(run(finished, f"--{setting}", str(value)), 78, said, "nothing would be trained")
    (finished / folder.LOCK).unlink()
    assert {**everything(finished), str(finished): ()} == {**before, str(finished): ()}


@pytest.mark.slow
def test_a_finished_run_that_goes_on_is_not_done_until_it_is(finished: Path) -> None:
    job = jobs.Job(0, ["-m", "distconv.train", *QUICK, "--out", finished, "--epochs", "500"])
    jobs.wait_until(lambda: events(finished).count("step") > 10, job)
    assert not (finished / "DONE").exists()
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish(20).returncode == 75


@pytest.mark.slow
def test_a_finished_run_goes_on_where_its_model_is_lost(finished: Path) -> None:
    newest, older = find_checkpoints(finished / "checkpoints")[:2]
    newest.unlink()
    assert look(finished, epochs=1) is None  # nor is it one of one epoch, whose accuracy nobody has measured
    result = run(finished)
    assert result.returncode == 0 and f"going on from {older}" in result.stdout
    assert load_checkpoint(newest).position["step"] == 10


# --- checkpoints that are gone, or damaged


def keep_metrics(out: Path, count: int) -> None:
    """Leave the first records only, as of a run that was killed then."""
    (out / "DONE").unlink()
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:count]))


@pytest.mark.parametrize(("folder_too", "records"), [(False, 99), (True, 9)])
def test_metrics_are_not_forgotten_where_the_checkpoints_are_gone(
    finished: Path, folder_too: bool, records: int
) -> None:
    if records < 99:
        keep_metrics(finished, records)
    shutil.rmtree(finished / "checkpoints")
    if not folder_too:
        (finished / "checkpoints").mkdir()
    before = everything(finished)
    with pytest.raises(MissingInputError, match=f"{finished}/metrics.jsonl .*{finished}/checkpoints: put them back"):
        look(finished)
    assert everything(finished) == before


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again_and_says_so(finished: Path) -> None:
    keep_metrics(finished, 4)
    for path in find_checkpoints(finished / "checkpoints"):
        path.unlink()
    result = run(finished)
    assert result.returncode == 0 and "no checkpoint yet: the run starts again, without the 3 steps" in result.stdout
    assert events(finished).count("step") == 10


def test_a_run_whose_checkpoints_have_all_been_set_aside_starts_again(finished: Path) -> None:
    keep_metrics(finished, 9)
    for path in find_checkpoints(finished / "checkpoints"):
        path.rename(path.with_name(f"diverged-{path.name}"))
    assert look(finished) is None


@pytest.mark.slow
def test_damaged_checkpoints_of_later_steps_push_out_no_good_ones(finished: Path) -> None:
    for step in (12, 14, 17):  # which the run will pass, between its own
        (finished / "checkpoints" / f"step-{step:010d}.safetensors").write_bytes(b"torn %d" % step)
    result = run(finished, "--epochs", "4", "--checkpoint-seconds", "0")
    assert result.returncode == 0 and result.stdout.count("passed over: ") == 3, result.stderr
    steps = [load_checkpoint(path).position["step"] for path in find_checkpoints(finished / "checkpoints")]
    assert steps == [20, 19, 18]
    for step in (12, 14, 17):
        path = finished / "checkpoints" / f"damaged-step-{step:010d}.safetensors"
        assert path.read_bytes() == b"torn %d" % step and str(path) in result.stdout


# --- other ways to name a folder


@pytest.mark.slow
def test_a_checkpoint_of_another_run_starts_one_in_a_folder_of_its_own(whole: Path, tmp_path: Path) -> None:
    before, newest = everything(whole), find_checkpoints(whole / "checkpoints")[0]
    result = run(tmp_path / "new", "--resume", newest, "--epochs", "3")
    assert result.returncode == 0 and f"going on from {newest}, after step 10 of 15" in result.stdout
    assert_one_sentence(
        run(tmp_path / "newer", "--resume", newest, "--epochs", "1"), 78, "epochs is now 1", str(newest)
    )
    assert everything(whole) == before
