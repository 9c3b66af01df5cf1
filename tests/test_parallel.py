"""tests/parallel under a real mpirun, on 1, 2, 3 and 4 ranks."""

from __future__ import annotations

import pytest

from tests import jobs


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_parallel_tests_pass_on_this_many_ranks(ranks: int) -> None:
    result = jobs.run(
        ranks, "-m", "mpi4py", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/parallel", seconds=110
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" passed") == ranks, result.stdout
