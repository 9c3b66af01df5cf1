"""A process takes one thread of BLAS, with and without mpirun, unless its user says how many."""

from __future__ import annotations

import os

import pytest

from tests import jobs

COUNT = """
import os, sys
if sys.argv[1] == "loaded":
    import numpy
from distconv.comm.start import start
with start() as world:
    before = len(os.listdir("/proc/self/task"))
    import numpy
    from distconv.comm.world import blas_threads
    numpy.ones((500, 500)) @ numpy.ones((500, 500))
    more = len(os.listdir("/proc/self/task")) - before
    os.write(1, f"{blas_threads()} {more}\\n".encode())  # at once, as the lines of two ranks may meet
"""
UNSET = {"OMP_NUM_THREADS": "", "OPENBLAS_NUM_THREADS": ""}


@pytest.mark.parametrize("ranks", [0, 1, 2])
def test_a_process_starts_no_thread_for_matrix_products(ranks: int) -> None:
    result = jobs.run(ranks, "-c", COUNT, "not loaded", **UNSET)
    assert result.stdout.splitlines() == ["1 0"] * max(1, ranks), result.stderr


def test_one_thread_is_used_where_numpy_was_loaded_before() -> None:
    result = jobs.run(0, "-c", COUNT, "loaded", **UNSET)
    assert result.stdout.split()[0] == "1", result.stderr


@pytest.mark.parametrize("name", UNSET)
def test_what_a_user_sets_wins(name: str) -> None:
    result = jobs.run(0, "-c", COUNT, "not loaded", **{**UNSET, name: "2"})
    assert result.stdout.split()[0] == str(min(2, len(os.sched_getaffinity(0)))), result.stderr
