"""distconv.launch with a real mpirun: a run over accidents to its end, a stop is a stop, and nothing is left behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest

from distconv.run.log import read_metrics
from distconv.supervise.supervisor import last_record
from tests import jobs
from tests.test_failures import FAILING, QUICK
from tests.test_train import parameters


def launch(out: Path, *flags: str | Path, **environment: str) -> jobs.Job:
    """distconv.launch with a real mpirun."""
    return jobs.Job(0, ["-m", "distconv.launch", "-n", "2", "--", *QUICK, "--out", out, *flags], **environment)


def trained(out: Path, steps: int) -> bool:
    """Whether a run has done so many steps, at least."""
    return int(last_record(out / "metrics.jsonl").get("step", 0)) >= steps


def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "run"
    assert launch(undisturbed, "--epochs", "4").finish(60).returncode == 0
    job = launch(out, "--epochs", "4", "--checkpoint-seconds", "0")
    jobs.wait_until(lambda: trained(out, 7), job)
    jobs.psutil.Process(job.ranks()[-1].pid).kill()
    result = job.finish(60)
    assert result.returncode == 0 and result.stderr.count("; restart 1 from step ") == 1
    assert "1 restart;" in result.stderr.splitlines()[-1] and "goodput" in result.stderr.splitlines()[-1]
    assert parameters(out) == parameters(undisturbed)
    assert len(read_metrics(out / "metrics.jsonl")) == len(read_metrics(undisturbed / "metrics.jsonl")) + 1


def test_a_run_of_shards_that_loses_ranks_for_good_ends_with_the_same_bits(tmp_path: Path) -> None:
    """An mpirun that has room for one rank less after each accident, and does not start more."""
    undisturbed, out, room = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "room"
    flags = ("--epochs", "4", "--shards", "5", "--checkpoint-seconds", "0", "--out")
    assert jobs.run(1, "-m", "distconv.train", *QUICK, *flags, undisturbed).returncode == 0
    room.write_text("4")
    starter = tmp_path / "starter"
    starter.write_text(
        f"#!/bin/sh\n[ $2 -le $(cat {room}) ] || {{ echo no room for $2 ranks >&2; exit 1; }}\nexec {jobs.MPIRUN} $@\n"
    )
    starter.chmod(0o755)
    launcher = ["-m", "distconv.launch", "-n", "4", "--at-least", "2", "--mpirun", starter]
    job = jobs.Job(0, [*launcher, "--", *QUICK, *flags, out])
    for left, steps in (("3", 4), ("2", 9)):
        jobs.wait_until(lambda steps=steps: trained(out, steps), job)  # type: ignore[misc]
        room.write_text(left)
        jobs.psutil.Process(job.ranks()[-1].pid).kill()
    result = job.finish(60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no room for 4 ranks" in result.stderr and "with 2 ranks fewer" in result.stderr
    ranks = [record["ranks"] for record in read_metrics(out / "metrics.jsonl") if record["event"] == "start"]
    assert ranks == [4, 3, 2] and parameters(out) == parameters(undisturbed)


@pytest.mark.slow
def test_a_restart_does_not_begin_with_the_file_of_resume_again(tmp_path: Path) -> None:
    first, undisturbed, out = tmp_path / "first", tmp_path / "undisturbed", tmp_path / "run"
    for folder, epochs in ((first, "1"), (undisturbed, "3")):
        assert launch(folder, "--epochs", epochs).finish(60).returncode == 0
    file = first / "checkpoints" / "step-0000000005.safetensors"
    job = launch(out, "--epochs", "3", "--resume", file, "--checkpoint-seconds", "600")
    jobs.wait_until(lambda: trained(out, 7), job)
    jobs.psutil.Process(job.ranks()[-1].pid).kill()
    result = job.finish(60)
    assert result.returncode == 0 and "; restart 1 from step 5" in result.stderr
    assert parameters(out) == parameters(undisturbed)


@pytest.mark.slow
def test_a_rank_that_fails_at_the_same_step_again_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING.format(what="raise ValueError('odd')"))
    out = tmp_path / "run"
    job = launch(out, "--model", "failing:network", PYTHONPATH=str(tmp_path), FAILING_RANK="1")
    result = job.finish(60)
    assert result.returncode == 1 and "ValueError: odd, twice in a row after step 3: given up" in result.stderr
    assert json.loads((out / "errors" / "rank-1.json").read_text())["error"] == "ValueError: odd"


@pytest.mark.slow
def test_where_fewer_ranks_may_be_started_the_same_failure_again_is_not_the_end(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING.format(what="raise MemoryError"))
    flags = ("--at-least", "1", "--", *QUICK, "--model", "failing:network", "--out", tmp_path / "run")
    command = ["-m", "distconv.launch", "-n", "3", *flags]
    result = jobs.Job(0, command, PYTHONPATH=str(tmp_path), FAILING_RANK="1").finish(90)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "; restart 2 " in result.stderr and "from the beginning, with 2 ranks fewer" in result.stderr


def test_bad_input_ends_with_the_code_of_the_training(tmp_path: Path) -> None:
    assert launch(tmp_path / "run", "--data", "/there/is/none").finish(30).returncode == 66


def test_a_stopped_run_has_a_checkpoint_and_ends_with_75(tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = launch(out, "--epochs", "500")
    jobs.wait_until(lambda: trained(out, 3), job)
    job.process.send_signal(signal.SIGTERM)
    result = job.finish(30)
    assert result.returncode == 75 and "stopped on request after step" in result.stdout
    assert not (out / "DONE").exists()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 3])
def test_a_supervisor_that_is_killed_takes_its_job_along(tmp_path: Path, steps: int) -> None:
    out = tmp_path / "run"
    job = launch(out, "--epochs", "500")
    jobs.wait_until((lambda: trained(out, steps)) if steps else (lambda: len(job.ranks()) > 1), job)
    children = psutil.Process(job.process.pid).children(recursive=True)
    job.process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    for process in alive:
        process.kill()
    assert job.finish(10).returncode == -signal.SIGKILL and alive == []
    if steps:  # the job has stopped as on request
        last = last_record(out / "metrics.jsonl")["step"]
        assert (out / f"checkpoints/step-{last:010d}.safetensors").exists()
