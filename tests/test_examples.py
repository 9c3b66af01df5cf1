"""The examples, as a reader starts them: whatever the number of ranks, they end in the same loss."""

from __future__ import annotations

import re

import pytest

from tests import jobs

TOLERANCE = 0.005  # as the examples say


def final_loss(example: str, ranks: int) -> float:
    result = jobs.run(ranks, f"examples/{example}.py", seconds=100, OMP_NUM_THREADS="1", PYTHONPATH=str(jobs.ROOT))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = re.findall(rf"^{ranks} ranks.*: loss (\d\.\d+)$", result.stdout, re.MULTILINE)
    assert len(lines) == 1, result.stdout
    return float(lines[0])


@pytest.mark.timeout(250)
@pytest.mark.parametrize("example", ["numpy_loop", "pytorch_loop", "pytorch_ddp_hook"])
def test_an_example_learns_and_ends_in_the_same_loss_on_any_number_of_ranks(example: str) -> None:
    if example.startswith("pytorch"):
        pytest.importorskip("torch")
    alone, together = (final_loss(example, ranks) for ranks in (1, 3))
    assert alone < 0.3  # from the 2.3 of a guess among ten
    assert together == pytest.approx(alone, rel=TOLERANCE)
