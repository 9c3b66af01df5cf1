"""Early stop and the best state, by a validation set and never by the test set."""

from __future__ import annotations

from pathlib import Path

import pytest

from distconv.run.checkpoint import load_checkpoint
from distconv.run.folder import find_checkpoints
from distconv.run.log import read_metrics
from tests import jobs
from tests.test_start import one_line

FLAGS = [
    "-m", "distconv.train", "--data", "digits", "--model", "simpleconvnet", "--limit-train", "300", "--epochs", "60",
    "--lr", "0.01", "--validation", "100", "--eval-samples", "0", "--patience", "2"
]  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has stopped early."""
    out = tmp_path_factory.mktemp("patience") / "run"
    result = jobs.run(2, *FLAGS, "--out", out, seconds=60)
    assert result.returncode == 0 and "stopped early" in result.stdout, result.stdout + result.stderr
    return out


def epochs(out: Path) -> list[dict[str, float]]:
    return [dict(record) for record in read_metrics(out / "metrics.jsonl") if record["event"] == "epoch"]


def test_a_run_stops_when_the_validation_score_was_not_beaten_for_so_long(stopped: Path) -> None:
    scores = [record["validation_accuracy"] for record in epochs(stopped)]
    best = scores.index(max(scores))
    assert len(scores) == best + 1 + 2 < 60
    for end in range(3, len(scores)):  # nor did it have to stop before
        assert max(scores[end - 2 : end]) > max(scores[: end - 2])


def test_the_best_state_is_kept_and_is_that_of_its_epoch(stopped: Path) -> None:
    scores = [record["validation_accuracy"] for record in epochs(stopped)]
    best = load_checkpoint(stopped / "best.safetensors")
    assert best.position["epoch"] == scores.index(max(scores)) + 1
    last = load_checkpoint(find_checkpoints(stopped / "checkpoints")[0])
    assert last.position["epoch"] == len(scores)


def test_a_run_that_stopped_early_is_finished(stopped: Path) -> None:
    before = (stopped / "metrics.jsonl").read_text()
    result = jobs.run(2, *FLAGS, "--out", stopped, seconds=60)
    assert result.returncode == 0 and "this run is finished" in result.stdout
    assert (stopped / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_run_that_goes_on_remembers_its_best_epoch(stopped: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = str(len(epochs(stopped)) - 1)  # the patience is half spent
    assert jobs.run(2, *FLAGS, "--epochs", first, "--out", out, seconds=60).returncode == 0
    assert "stopped early" in jobs.run(2, *FLAGS, "--out", out, seconds=60).stdout
    shas = [[record["parameters_sha256"] for record in epochs(folder)] for folder in (out, stopped)]
    assert shas[0] == shas[1]


def test_without_a_validation_set_there_is_nothing_to_stop_by(tmp_path: Path) -> None:
    result = jobs.run(
        2, "-m", "distconv.train", "--data", "digits", "--patience", "3", "--out", tmp_path / "run", seconds=60
    )
    assert result.returncode == 2
    assert "--validation" in one_line(result.stderr)
