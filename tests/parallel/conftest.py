"""Tests that hold on any number of ranks; tests/test_parallel.py starts them under mpirun on 1, 2, 3 and 4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from distconv.comm.start import start
from distconv.comm.world import World
from tests.emulator import kernel_folder


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """The ranks of this job. A failure on one rank ends all of them: mpirun starts `python -m mpi4py -m pytest -x`."""
    yield start()


@pytest.fixture(scope="module")
def folder(world: World) -> Iterator[Path]:
    """One for all ranks: what one has compiled, the others load."""
    yield world.comm.bcast(kernel_folder())
    world.comm.Barrier()
