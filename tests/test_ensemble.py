"""`--ensemble`: several runs in one job, each as if it were alone."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from distconv.run.log import read_metrics
from tests import jobs

TRAIN = ["-m", "distconv.train", "--data", "digits", "--limit-train", "200", "--model", "simpleconvnet"]
FLAGS = [*TRAIN, "--epochs", "2"]


def sha(out: Path) -> object:
    return read_metrics(out / "metrics.jsonl")[-1]["parameters_sha256"]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ensemble") / "out"
    result = jobs.run(3, *FLAGS, "--seed", "5", "--ensemble", "2", "--out", out, seconds=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"together: python -m distconv.evaluate {out}"
    return out


@pytest.mark.parametrize(("member", "ranks"), [(0, 2), (1, 1)])
def test_each_run_is_that_of_its_seed_on_as_many_ranks(together: Path, tmp_path: Path, member: int, ranks: int) -> None:
    alone = tmp_path / "alone"
    assert jobs.run(ranks, *FLAGS, "--seed", str(5 + member), "--out", alone, seconds=60).returncode == 0
    assert sha(together / f"member-{member}") == sha(alone)


def test_its_folder_stands_for_the_runs_in_it(together: Path) -> None:
    runs = sorted(together.glob("member-*"))
    found = [jobs.run(0, "-m", "distconv.evaluate", "--json", *given) for given in ([together], runs)]
    assert found[0].returncode == 0 and found[0].stdout == found[1].stdout
    assert [json.loads(line)["model"] for line in found[0].stdout.splitlines()] == [*map(str, runs), "ensemble"]
    assert jobs.run(0, "-m", "distconv.report", together).stdout == f"written to {together}/report.html\n"
    assert "member-1" in (together / "report.html").read_text()


@pytest.mark.slow
def test_with_fewer_ranks_each_trains_its_runs_one_after_the_other(together: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = jobs.run(2, *FLAGS, "--seed", "4", "--ensemble", "3", "--out", out, seconds=60)
    assert result.returncode == 0, result.stderr
    assert [(out / f"member-{member}" / "DONE").exists() for member in range(3)] == [True] * 3
    assert sha(out / "member-2") == sha(together / "member-1")  # seed 6, on one rank


@pytest.mark.slow
def test_runs_that_are_stopped_all_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = [*TRAIN, "--epochs", "20", "--ensemble", "2"]
    job = jobs.Job(2, [*flags, "--out", out])
    jobs.wait_until(lambda: all(len(read_metrics(out / f"member-{m}/metrics.jsonl")) > 5 for m in range(2)), job)
    for rank in job.ranks():
        rank.send_signal(signal.SIGTERM)
    stopped = job.finish(30)
    assert stopped.returncode == 75 and stopped.stdout.count("stopped on request after") == 2, stopped.stdout
    assert re.findall("--out [^ \n]*", stopped.stdout) == [f"--out {out}"]  # with a member's, it would be another one
    assert jobs.run(2, *flags, "--out", out, seconds=60).returncode == 0
    assert jobs.run(1, *TRAIN, "--epochs", "20", "--seed", "1", "--out", tmp_path / "alone", seconds=60).returncode == 0
    assert sha(out / "member-1") == sha(tmp_path / "alone")


def test_a_run_that_fails_ends_the_job_with_its_own_sentence(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "member-1").write_text("somebody's")
    result = jobs.run(2, *FLAGS, "--epochs", "500", "--ensemble", "2", "--out", out, seconds=30)
    assert result.returncode == 73
    assert [line for line in result.stderr.splitlines() if "member-1" in line and "cannot be written" in line]


@pytest.mark.parametrize(
    ("flag", "given", "code", "said"),
    [("--trace", ".", 73, "--trace . is a folder: name a file"), ("--resume", "x.safetensors", 2, "its own folder")],
)
def test_what_runs_cannot_share_is_refused(flag: str, given: str, code: int, said: str, tmp_path: Path) -> None:
    result = jobs.run(0, *FLAGS, "--ensemble", "2", "--out", tmp_path / "out", flag, given)
    assert result.returncode == code and not (tmp_path / "out").exists()
    (sentence,) = result.stderr.splitlines()
    assert said in sentence


@pytest.mark.slow
def test_the_loss_of_a_rank_ends_all_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = jobs.Job(2, [*FLAGS, "--epochs", "500", "--ensemble", "2", "--out", out])
    jobs.wait_until(lambda: all(len(read_metrics(out / f"member-{m}/metrics.jsonl")) > 5 for m in range(2)), job)
    job.ranks()[1].kill()
    assert job.finish(30).returncode != 0


@pytest.mark.slow
def test_a_missed_target_of_any_run_is_the_exit_code(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = jobs.run(2, *FLAGS, "--ensemble", "2", "--target-accuracy", "1", "--out", out, seconds=60)
    assert result.returncode == 1
