"""What the environment of a launcher says, for each launcher and for those within one another."""

from __future__ import annotations

import sys

import pytest

from distconv.process import roll_call
from distconv.process.launched import LAUNCHERS, Launched, in_a_job, launched

HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PRRTE = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
STEP = {  # a task of srun on the second of three nodes
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NODEID": "1",
}
BATCH = {"SLURM_NTASKS": "5", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}  # a batch script's shell

SHELL = {**STEP, "SLURM_STEP_NUM_TASKS": "1"}  # which salloc opens on a node


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in LAUNCHERS:
        for name in names[1:]:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("PMIX_RANK", raising=False)


def told_by(monkeypatch: pytest.MonkeyPatch, *environments: dict[str, str]) -> Launched:
    for environment in environments:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
    return launched()


def places(told: Launched) -> tuple[int, int, int, int | None]:
    return told.rank, told.size, told.local_rank, told.local_size


@pytest.mark.parametrize(
    ("environments", "expected"),
    [
        ([], (0, 1, 0, None)),
        ([HYDRA], (1, 4, 1, 2)),
        ([PRRTE], (3, 4, 1, 2)),
        ([STEP], (2, 5, 0, 2)),
        ([STEP, {"PMI_RANK": "2", "PMI_SIZE": "5"}], (2, 5, 0, 2)),  # srun --mpi=pmi2
        ([STEP, {"PMIX_RANK": "2"}], (2, 5, 0, 2)),  # srun --mpi=pmix
        ([STEP, HYDRA], (1, 4, 1, 2)),  # hydra has started its proxies by srun
        ([STEP, PRRTE], (3, 4, 1, 2)),
        ([BATCH], (0, 1, 0, None)),  # an allocation of five is no job of five
        ([{"PALS_RANKID": "5", "PALS_NRANKS": "8", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4"}], (5, 8, 1, 4)),
        ([{"PALS_NRANKS": "8"}], (0, 1, 0, None)),  # a wish for mpiexec, in a batch script
        ([{"FLUX_TASK_RANK": "2", "FLUX_JOB_SIZE": "3", "FLUX_TASK_LOCAL_ID": "0"}], (2, 3, 0, None)),
        ([{"PMI_RANK": "one", "PMI_SIZE": "4"}], (0, 1, 0, None)),
    ],
)
def test_rank_and_size_are_those_of_the_innermost_launcher(
    monkeypatch: pytest.MonkeyPatch, environments: list[dict[str, str]], expected: tuple[int, int, int, int | None]
) -> None:
    assert places(told_by(monkeypatch, *environments))[: len(expected)] == expected


@pytest.mark.parametrize(("environment", "is_a_rank"), [({}, False), (HYDRA, True), (STEP, True), (SHELL, False)])
def test_a_shell_of_a_batch_system_may_start_jobs_and_a_rank_may_not(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], is_a_rank: bool
) -> None:
    told_by(monkeypatch, environment)
    assert in_a_job() is is_a_rank


def test_without_psutil_nobody_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "launcher_process", lambda: 1)
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert roll_call.ranks_here(Launched()) == {}
