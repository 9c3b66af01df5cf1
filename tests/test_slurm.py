"""On a real Slurm of two nodes: all ranks train together, launch/slurm.sbatch loses nothing, and mistakes are told."""

from __future__ import annotations

import importlib.metadata
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from distconv.supervise.supervisor import last_record
from tests import jobs
from tests.slurm import Slurm, edit, events, slurm, why_there_can_be_no_slurm

REASON = why_there_can_be_no_slurm()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

SCRIPT = jobs.ROOT / "launch" / "slurm.sbatch"
OPEN_MPI = any(found.name == "openmpi" for found in importlib.metadata.distributions())
SRUN = f"srun --mpi={'pmix' if OPEN_MPI else 'pmi2'} -K"
# A step takes longer than the 20 ms between the two signals of a time limit.
TRAIN = "python -m distconv.train --data digits --limit-train 600 --batch-size 200 --eval-samples 40 --epochs"
LONG = f"{TRAIN} 30"
ONE_A_NODE = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The digest of the parameters at the end of a run that nobody stops."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert jobs.run(2, *LONG.split()[1:], "--out", out, seconds=100).returncode == 0
    return events(out, "final")[0]["parameters_sha256"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, undisturbed: object) -> Iterator[Slurm]:
    """After a first run, by which the kernels are compiled."""
    with slurm(tmp_path_factory.mktemp("slurm")) as running:
        if OPEN_MPI and running.run("srun", "--mpi=pmix", "true").returncode != 0:
            pytest.skip("this Slurm cannot start Open MPI's ranks: apt-get install libpmix-dev")
        yield running


def assert_all_trained_together(out: Path, ranks: int) -> None:
    (start,) = events(out, "start")
    assert (start["ranks"], start["hosts"]) == (ranks, 2)
    assert (out / "DONE").exists()


def test_srun_starts_one_training_of_all_ranks(cluster: Slurm, tmp_path: Path) -> None:
    result = cluster.run(*SRUN.split(), "-N2", "-n4", *TRAIN.split(), "1", "--out", tmp_path / "run")
    assert result.returncode == 0, result.stdout + result.stderr
    assert_all_trained_together(tmp_path / "run", 4)


def test_mpirun_takes_all_of_an_allocation(cluster: Slurm, tmp_path: Path) -> None:
    job = cluster.submit(f"mpirun {TRAIN} 1 --out run", *ONE_A_NODE, f"--chdir={tmp_path}", "--output=log")
    assert cluster.wait(job)["JobState"] == "COMPLETED", (tmp_path / "log").read_text()
    assert_all_trained_together(tmp_path / "run", 2)


def test_srun_that_tells_ranks_nothing_of_one_another_is_refused(cluster: Slurm, tmp_path: Path) -> None:
    result = cluster.run("srun", "--mpi=none", "-n2", *TRAIN.split(), "1", "--out", tmp_path / "run")
    assert result.returncode != 0
    (sentence,) = [line for line in result.stderr.splitlines() if "distconv: " in line]
    assert "--mpi" in sentence
    assert not (tmp_path / "run").exists()


def test_prove_works_in_a_batch_job(cluster: Slurm, tmp_path: Path) -> None:
    prove = "python -m distconv.prove --ranks 1,2 --wires float16"
    job = cluster.submit(prove, *ONE_A_NODE, f"--chdir={tmp_path}", "--output=log")
    state = cluster.wait(job)["JobState"]
    said = (tmp_path / "log").read_text()
    assert state == "COMPLETED" and "the number of ranks does not change the run" in said, said


def submit(cluster: Slurm, folder: Path, command: str) -> str:
    """Submit the script as it is shipped, but for the two places that users edit."""
    run = f'out=run\nrun=({SRUN} --gpu-bind=none {command} --out "$out")'
    (folder / SCRIPT.name).write_text(edit(SCRIPT, "#SBATCH --nodes=2 --ntasks-per-node=1 --time=10", run))
    return cluster.submit(folder / SCRIPT.name, f"--chdir={folder}")


def the_signal_before_the_limit(cluster: Slurm, job: str) -> None:
    cluster.run("scancel", "--batch", "--signal=USR1", job)


def what_the_limit_does(cluster: Slurm, job: str) -> None:
    for _ in range(2):
        for rank in cluster.ranks():
            rank.send_signal(signal.SIGTERM)
        time.sleep(0.02)  # so long Slurm waits between the two


def the_loss_of_a_rank(cluster: Slurm, job: str) -> None:
    (second,) = [rank for rank in cluster.ranks() if rank.environ()["SLURM_PROCID"] == "1"]
    second.kill()


@pytest.mark.parametrize("happens", [the_signal_before_the_limit, what_the_limit_does, the_loss_of_a_rank])
def test_the_shipped_script_brings_a_run_to_its_end_whatever_happens(
    cluster: Slurm, undisturbed: object, tmp_path: Path, happens: Callable[[Slurm, str], None]
) -> None:
    out = tmp_path / "run"
    job = submit(cluster, tmp_path, f"{LONG} --checkpoint-seconds 0.1")
    cluster.wait_until(lambda: len(events(out, "step")) > 4 and any((out / "checkpoints").iterdir()))
    happens(cluster, job)
    cluster.wait(job, "PENDING", seconds=30)  # a promise: a job does not wait for ever for a rank that is lost
    assert not (out / "DONE").exists()
    reached = len(events(out, "step"))
    cluster.go_on(job)
    assert cluster.wait(job)["JobState"] == "COMPLETED", (tmp_path / f"distconv-{job}.log").read_text()
    _, again = events(out, "start")
    lost = reached - int(str(again["resumed_step"]))
    assert lost == 0 or happens is the_loss_of_a_rank
    assert events(out, "final")[0]["parameters_sha256"] == undisturbed


def test_the_shipped_script_does_not_repeat_a_failure(cluster: Slurm, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "python -m distconv.train --data /there/is/none")
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")


def test_a_supervised_run_survives_the_loss_of_a_rank_and_stops_on_request(cluster: Slurm, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = [*LONG.split()[3:-1], "500", "--checkpoint-seconds", "0.1", "--out", out]
    launch = cluster.start("python", "-m", "distconv.launch", "-n", "2", "--mpirun", f"{SRUN} -N2", "--", *train)
    cluster.wait_until(lambda: len(events(out, "step")) > 4 and any((out / "checkpoints").iterdir()))
    the_loss_of_a_rank(cluster, "")
    cluster.wait_until(lambda: len(events(out, "start")) == 2 and last_record(out / "metrics.jsonl")["event"] == "step")
    (supervisor,) = psutil.Process(launch.pid).children()
    supervisor.send_signal(signal.SIGTERM)  # which srun itself would answer with SIGKILL
    said, errors = launch.communicate(timeout=60)
    assert launch.returncode == 75 and "stopped on request after step" in said, said + errors
    assert len(events(out, "start")) == 2 and re.search(r"; restart \d from step ", errors), errors
    assert cluster.ranks() == []
