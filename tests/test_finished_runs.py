"""A folder that holds a run: it is told as finished or goes on, and what is spoilt or odd in it is found out."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distconv.errors import CannotCreateError, MismatchError, MissingInputError
from distconv.run import folder
from distconv.run.checkpoint import load_checkpoint, newest_good
from distconv.run.folder import find_checkpoints
from distconv.run.log import read_metrics
from tests import jobs
from tests.folders import events, everything, look, put, run
from tests.test_failures import QUICK, assert_one_sentence


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


# --- what is not distconv's


@pytest.mark.slow
def test_what_a_link_leads_to_is_not_written(finished: Path, tmp_path: Path) -> None:
    """One with the name of a file that a run makes for itself."""
    (tmp_path / "theirs").write_text("mine")
    for name in (".config.toml.tmp", ".metrics.jsonl.tmp", ".DONE.tmp", ".report.html.tmp", ".answers.npz.tmp"):
        (finished / name).symlink_to(tmp_path / "theirs")
    assert run(finished, "--epochs", "3").returncode == 0
    (finished / folder.LOCK).unlink()
    (finished / folder.LOCK).symlink_to(tmp_path / "theirs")
    assert_one_sentence(run(finished, "--epochs", "4"), 73, folder.LOCK, "symbolic link")
    assert (tmp_path / "theirs").read_text() == "mine"


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


def test_a_run_whose_checkpoints_are_links_to_a_place_that_is_not_there_does_not_start_again(finished: Path) -> None:
    keep_metrics(finished, 9)
    for path in find_checkpoints(finished / "checkpoints"):
        path.unlink()
        path.symlink_to(f"/there/is/none/{path.name}")
    with pytest.raises(MissingInputError, match=r"step-0000000010\.safetensors is not a file"):
        newest_good(finished / "checkpoints")


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
