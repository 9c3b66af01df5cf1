"""Each check of the doctor sees its fault in the facts of the ranks, names where it is, and is content without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from distconv.checkup import checks
from distconv.checkup.checks import Finding
from distconv.checkup.facts import Facts

Check = Callable[[Sequence[Facts]], Finding]

HEALTHY: Facts = {
    "rank": 0,
    "host": "h0",
    "launcher": "pmi",
    "distconv": "0.1.0",
    "code": "abc",
    "python": "3.11.7",
    "executable": "/usr/bin/python",
    "numpy": "2.4.6",
    "numba": "0.68.1",
    "mpi4py": "4.1.2",
    "mpi": "MPICH 5.0.2",
    "machine": "x86_64",
    "cores": [0, 1],
    "host_cores": 2,
    "core_limit": None,
    "memory_limit": None,
    "blas_threads": 1,
    "shared_memory": 1 << 33,
    "reading_refused": False,
    "name_resolves": True,
    "folder": "/scratch",
    "folder_free": 1 << 40,
    "folder_problem": "",
    "compiled": True,
    "mnist": "/data/mnist",
    "cache_problem": "",
    "gpus": [],
    "gpu_problem": "CuPy is not installed (no module)",
    "driver": "",
    "nccl": "",
    "cuda_mpi": "",
}
GPU = {"gpus": ["H100"], "gpu_problem": "", "driver": "CUDA 12.8", "nccl": "2.27.3", "cuda_mpi": "yes"}


def four_ranks(everywhere: Facts | None = None, **of_rank_3: object) -> list[Facts]:
    """Two ranks on each of two hosts; the last one differs as said."""
    ranks = [{**HEALTHY, **(everywhere or {}), "rank": rank, "host": f"h{rank // 2}"} for rank in range(4)]
    ranks[3].update(of_rank_3)
    return ranks


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("ranks", [four_ranks(), four_ranks(GPU), four_ranks()[:1]], ids=["cpu", "gpu", "alone"])
def test_without_a_fault_every_check_is_content(
    check: Callable[[Sequence[Facts]], Finding], ranks: list[Facts]
) -> None:
    finding = check(ranks)
    assert finding.status == "ok" and finding.found and not finding.advice


ON_RANK_3 = "rank 3 on h1"


@pytest.mark.parametrize(
    ("check", "ranks", "status", "named"),
    [
        (checks.versions, four_ranks(numpy="1.26.4"), "fault", "numpy 1.26.4 on rank 3 (h1), 2.4.6 elsewhere"),
        (checks.versions, four_ranks(code="xyz"), "fault", "code xyz on rank 3"),
        (checks.versions, four_ranks(mpi="Open MPI 5.0.11"), "fault", "Open MPI 5.0.11 on rank 3"),
        (checks.versions, four_ranks({"numba": "cannot be imported (no)"}), "fault", "numba cannot be imported"),
        (checks.host_names, four_ranks(name_resolves=False), "fault", ON_RANK_3),
        (checks.cores, four_ranks({"cores": [0], "host_cores": 16}), "slow", "2 ranks of h0 may use 1 of its 16 cores"),
        (checks.cores, four_ranks({"core_limit": 0.5}), "slow", "a limit of 0.5 cores"),
        (checks.cores, four_ranks({"blas_threads": 16}), "slow", "32 BLAS threads on 2 cores"),
        (checks.shared_memory, four_ranks(shared_memory=1 << 20), "slow", ON_RANK_3),
        (checks.shared_memory, four_ranks(reading_refused=True), "slow", ON_RANK_3),
        (checks.disks, four_ranks({"folder_problem": "Read-only file system"}), "slow", "/scratch: Read-only"),
        (checks.disks, four_ranks({"folder_free": 5 << 20}), "slow", "5 MiB free in /scratch"),
        (checks.data, four_ranks(mnist=""), "fault", f"no MNIST for {ON_RANK_3}"),
        (checks.disks, four_ranks(cache_problem="Permission denied"), "slow", ON_RANK_3),
        (
            checks.gpus,
            four_ranks(GPU, gpus=[], gpu_problem="no driver"),
            "fault",
            f"no GPU for {ON_RANK_3} (no driver)",
        ),
        (checks.gpus, four_ranks(GPU, driver="CUDA 12.2"), "slow", "CUDA 12.2, CUDA 12.8"),
    ],
)
def test_a_fault_is_seen_and_named_with_advice(check: Check, ranks: list[Facts], status: str, named: str) -> None:
    finding = check(ranks)
    assert finding.status == status and named in finding.found and finding.advice


def test_the_odd_rank_is_the_one_in_the_minority() -> None:
    ranks = four_ranks()
    ranks[0]["numpy"] = "1.0"
    assert "numpy 1.0 on rank 0 (h0), 2.4.6 elsewhere" in checks.versions(ranks).found


def test_a_clock_that_is_off_is_named() -> None:
    finding = checks.clocks({0: 0.0, 1: 0.2, 2: -0.1, 3: -75.0}, four_ranks())
    assert finding.status == "slow" and f"{ON_RANK_3} is -75.0 s off" in finding.found
    assert checks.clocks({0: 0.0, 1: 0.2, 2: -0.1}, four_ranks()).status == "ok"
