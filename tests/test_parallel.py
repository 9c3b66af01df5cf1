"""tests/parallel under a real mpirun, on 1, 2, 3 and 4 ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import jobs


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the jobs find what an earlier one has compiled for the emulated GPU."""
    return Path(os.environ.get("EMULATED_KERNELS") or tmp_path_factory.mktemp("kernels"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_parallel_tests_pass_on_this_many_ranks(ranks: int, kernels: Path) -> None:
    command = ("-m", "mpi4py", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/parallel")
    result = jobs.run(ranks, *command, seconds=280, EMULATED_KERNELS=str(kernels))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" passed") == ranks, result.stdout
