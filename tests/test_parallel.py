"""tests/parallel under a real mpirun, on 1, 2, 3 and 4 ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import jobs


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [*(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2, 4)), 3])
def test_the_parallel_tests_pass_on_this_many_ranks(ranks: int, tmp_path: Path) -> None:
    command = ("-m", "mpi4py", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/parallel")
    # Each rank's pytest removes what old ones have left, and two of them may meet at the same folder: here is none.
    result = jobs.run(ranks, *command, seconds=280, PYTEST_DEBUG_TEMPROOT=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" passed") == ranks, result.stdout
