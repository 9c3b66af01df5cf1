"""A rank or a host that hangs costs seconds: the job ends with 76, and says who it was, where, and doing what."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from distconv.run.log import read_metrics
from tests import jobs
from tests.test_box import BOX, needs_a_box

TRAIN = ("-m", "distconv.train", "--data", "digits", "--limit-train", "150", "--batch-size", "32")
ENDLESS = (*TRAIN, "--epochs", "100000", "--hang-seconds", "5")
SECONDS = 10.0  # a promise to users: to the end from the moment a rank hangs, with --hang-seconds 5


def ranks_of(process: int) -> dict[int, psutil.Process]:
    """The ranks among the descendants of a process."""
    found = {}
    for child in psutil.Process(process).children(recursive=True):
        environment = child.environ()
        rank = environment.get("PMI_RANK", environment.get("OMPI_COMM_WORLD_RANK"))
        if rank is not None and "python" in child.name():
            found[int(rank)] = child
    return found


def steps(out: Path) -> int:
    return sum(record["event"] == "step" for record in read_metrics(out / "metrics.jsonl"))


def stop(job: jobs.Job, out: Path, rank: int) -> None:
    jobs.wait_until(lambda: steps(out) >= 7, job)
    ranks_of(job.process.pid)[rank].send_signal(signal.SIGSTOP)


def report(out: Path, rank: int) -> str:
    """The stack that a rank has left."""
    text: str = json.loads((out / "errors" / f"rank-{rank}.json").read_text())["traceback"]
    return text


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (3, 1)])
def test_a_stopped_rank_is_named_and_ends_the_job(tmp_path: Path, ranks: int, rank: int) -> None:
    out = tmp_path / "run"
    job = jobs.Job(ranks, (*ENDLESS, "--out", out))
    stop(job, out, rank)
    result = job.finish(SECONDS)
    assert result.returncode == 76, result.stdout + result.stderr
    assert f"rank {rank} of {ranks} on " in result.stderr and f"kill -STOP has stopped rank {rank}" in result.stderr
    assert result.stderr.count("so the job ends") == 1
    for every in range(ranks):
        assert "training.py" in report(out, every)  # mostly loop.py too, but a rank may be stopped between two records


@pytest.mark.slow
def test_a_request_to_stop_does_not_keep_a_hung_job(tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = jobs.Job(2, (*ENDLESS, "--out", out))
    stop(job, out, 1)
    for rank in ranks_of(job.process.pid).values():
        rank.send_signal(signal.SIGTERM)
    assert job.finish(SECONDS).returncode == 76


@pytest.mark.slow
def test_a_job_that_is_stopped_as_a_whole_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = jobs.Job(2, (*ENDLESS, "--hang-seconds", "2", "--out", out))
    jobs.wait_until(lambda: steps(out) >= 7, job)
    everyone = list(ranks_of(job.process.pid).values())
    for rank in everyone:
        rank.send_signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        job.process.wait(4)  # twice as long as a rank may hang
    for rank in everyone:
        rank.send_signal(signal.SIGCONT)
    done = steps(out)
    jobs.wait_until(lambda: steps(out) > done + 7, job)
    for rank in everyone:
        rank.send_signal(signal.SIGUSR1)
    assert job.finish(30).returncode == 75


BLOCKING = """
import ctypes, os, time
from distconv.process.launched import launcher_rank
from distconv.nn.networks import deepconvnet

class Blocking:
    def __init__(self, inner): self.inner = inner
    def shapes(self, shape): return self.inner.shapes(shape)
    def forward(self, x, params, context):
        if context.training and context.step == 7 and launcher_rank() == int(os.environ["RANK"]):
            open(os.environ["REACHED"], "w").close()
            {how}
        return self.inner.forward(x, params, context)

def network(classes): return Blocking(deepconvnet(classes))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("from mpi4py import MPI; MPI.COMM_WORLD.Barrier()", "did not come on"),
        ("ctypes.PyDLL(None).sleep(1000)", "gave no sign of life"),  # no other thread of Python can run
    ],
)
def test_a_layer_that_blocks_one_rank_ends_the_job(tmp_path: Path, how: str, told: str) -> None:
    (tmp_path / "blocking.py").write_text(BLOCKING.format(how=how))
    out, reached = tmp_path / "run", tmp_path / "reached"
    arguments = (*ENDLESS, "--model", "blocking:network", "--out", out)
    job = jobs.Job(2, arguments, PYTHONPATH=str(tmp_path), RANK="1", REACHED=str(reached))
    jobs.wait_until(reached.exists, job)
    result = job.finish(SECONDS)
    assert result.returncode == 76, result.stdout + result.stderr
    assert f"(compute, step 8) {told}" in result.stderr and "rank 1 of 2 on " in result.stderr
    assert "blocking.py" in report(out, 1) and "blocking.py" not in report(out, 0)


@pytest.mark.slow
def test_a_rank_that_is_alone_and_blocks_ends_too(tmp_path: Path) -> None:
    (tmp_path / "blocking.py").write_text(BLOCKING.format(how="time.sleep(1000)"))
    arguments = (*ENDLESS, "--model", "blocking:network", "--out", tmp_path / "run")
    result = jobs.run(0, *arguments, PYTHONPATH=str(tmp_path), RANK="0", REACHED=str(tmp_path / "reached"))
    assert result.returncode == 76 and "rank 0 of 1 on " in result.stderr


@pytest.mark.slow
@needs_a_box
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_of_another_host_ends_the_job(tmp_path: Path, rank: int) -> None:
    out = tmp_path / "run"
    command = [sys.executable, str(BOX), "--", jobs.MPIRUN, "-n", "2", sys.executable, *ENDLESS, "--out", str(out)]
    job = jobs.Job(None, command)
    stop(job, out, rank)
    result = job.finish(SECONDS)
    assert result.returncode == 76, result.stdout + result.stderr
    assert f"rank {rank} of 2 on h{rank} (" in result.stderr and "gave no sign of life" in result.stderr


@pytest.mark.slow
@needs_a_box
@pytest.mark.skipif(jobs.OPEN_MPI, reason="its mpirun waits for the daemon of the lost host; the ranks end")
def test_a_host_that_vanishes_ends_the_job(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, str(BOX), "--", jobs.MPIRUN, "-n", "2", sys.executable, *ENDLESS, "--out", str(out)]
    job = jobs.Job(None, command)
    jobs.wait_until(lambda: steps(out) >= 7, job)
    host = f"dcbox-{job.process.pid}-h1"
    subprocess.run(["ip", "-n", host, "link", "set", "eth0", "down"], check=True)
    result = job.finish(SECONDS)
    assert result.returncode == 76, result.stdout + result.stderr
    assert "rank 1 of 2 on h1 (" in result.stderr and "network is down" in result.stderr


def test_ranks_whose_launcher_is_killed_end(tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = jobs.Job(2, (*ENDLESS, "--out", out))
    jobs.wait_until(lambda: steps(out) >= 7, job)
    ranks = list(ranks_of(job.process.pid).values())
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait(10)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    job.process.communicate()
