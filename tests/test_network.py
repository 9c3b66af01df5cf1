"""What crosses a real network, counted at the interfaces of hosts in a box."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from distconv.run.log import read_metrics
from tests.jobs import MPIRUN
from tests.test_box import needs_a_box, run_box

EXCHANGES = """
import sys
import numpy as np
from distconv.comm.choose import choose
from distconv.comm.exchange import HEADER
from distconv.comm.start import start

wire, kind = sys.argv[1:]
with start() as world:
    exchange = choose(world, 1 << 20, wire, kind)
    for _ in range(10):
        exchange.sum(np.ones(1 << 20, np.float32), np.zeros((), HEADER))
"""


@needs_a_box
def test_float16_halves_the_bytes_at_the_interfaces(tmp_path: Path) -> None:
    program = tmp_path / "exchanges.py"
    program.write_text(EXCHANGES)
    sent = {}
    for wire, kind in (("float16", "auto"), ("float32", "mpi")):
        result = run_box("--hosts", 2, "--json", "--", MPIRUN, "-n", 2, sys.executable, program, wire, kind)
        assert result.returncode == 0, result.stderr
        sent[wire] = sum(json.loads(result.stdout.splitlines()[-1])["bytes_sent"])
    assert sent["float16"] <= 0.52 * sent["float32"]


@pytest.mark.slow
@needs_a_box
def test_hosts_with_two_ranks_each_train_in_two_levels(tmp_path: Path) -> None:
    out = tmp_path / "run"
    quick = ("--data", "digits", "--limit-train", 60, "--batch-size", 30, "--eval-samples", 9, "--epochs", 1)
    result = run_box("--", MPIRUN, "-n", 4, sys.executable, "-m", "distconv.train", *quick, "--out", out)
    assert result.returncode == 0, result.stderr
    start, step, *_ = read_metrics(out / "metrics.jsonl")
    assert (start["ranks"], start["hosts"]) == (4, 2)
    assert start["exchange"] == "two-level, 2 hosts x 2 ranks, messages between hosts"
    assert step["wire_bytes"] < 130_000  # twice a quarter of 123,552 numbers, of 2 bytes; flat sends three times that
