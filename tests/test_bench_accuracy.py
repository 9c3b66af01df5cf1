"""`bench accuracy`: seconds to an accuracy and what comes out at the end, over several seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence

import pytest

from distconv.benchmarks.accuracy import Reached, mean_and_deviation, reached, table
from distconv.errors import DistconvError
from tests import jobs


def records(scores: Sequence[float], key: str = "test_accuracy") -> list[dict[str, object]]:
    """Of a run from time 1000 on: epochs of 250 images, steps of 100 images and 10 s, 5 s for an evaluation."""
    found: list[dict[str, object]] = [
        {"event": "start", "time": 1003.0, "ranks": 2, "train_images": 250, "batch_size": 100}
    ]
    now, step = 1003.0, 0
    for score in scores:
        for images in (100, 100, 50):
            now, step = now + 10, step + 1
            found.append({"event": "step", "time": now, "step": step, "images_per_second": images / 10})
        now += 5
        found.append({"event": "epoch", "time": now, "step": step, "test_accuracy": 0.5, key: score})
    found.append({"event": "final", "time": now + 5, "step": step, "test_accuracy": 0.5, key: scores[-1]})
    return found


@pytest.mark.parametrize("key", ["test_accuracy", "ema_test_accuracy"])
def test_a_target_is_reached_after_the_first_epoch_that_has_it(key: str) -> None:
    run = reached(records([0.7, 0.95, 0.91, 0.97], key), 3, 1000.0, [0.7, 0.9, 0.96, 0.99])
    assert (run.seed, run.ranks, run.accuracy) == (3, 2, 0.97)
    assert math.isclose(run.training_seconds, 120) and math.isclose(run.total_seconds, 148)
    expected = {0.7: (30, 38), 0.9: (60, 73), 0.96: (120, 143)}
    assert run.targets.keys() == expected.keys()
    for target, (training, total) in expected.items():
        assert run.targets[target] == pytest.approx((training, total))


def test_a_run_without_a_test_accuracy_is_refused() -> None:
    with pytest.raises(DistconvError, match="classify"):
        reached([{"event": "final", "time": 1.0, "test_return": 3.0}], 0, 0.0, [0.9])


def test_the_table_has_means_and_deviations_of_the_runs_that_reached_a_target() -> None:
    runs = [Reached(seed, 2, 0.98 + seed / 1000, 20.0 + seed, 30.0, {0.98: (10.0 + seed, 15.0)}) for seed in range(3)]
    runs.append(Reached(3, 2, 0.97, 23.0, 30.0, {}))
    first, second, end, accuracy = table(runs, [0.98, 0.99]).splitlines()[1:]
    assert first.split() == [
        "98.00%",
        "3",
        "of",
        "4",
        "11.0",
        "\N{PLUS-MINUS SIGN}",
        "1.0",
        "15.0",
        "\N{PLUS-MINUS SIGN}",
        "0.0",
    ]
    assert second.split() == ["99.00%", "0", "of", "4", "-", "-"]
    assert end.split()[3:6] == ["21.5", "\N{PLUS-MINUS SIGN}", f"{statistics.stdev([20, 21, 22, 23]):.1f}"]
    assert accuracy.startswith("accuracy at the end: 97.825")
    assert mean_and_deviation([1.25]) == "1.2"


def test_each_seed_is_a_run_of_its_own() -> None:
    flags = ["--seeds", "2", "--targets", "0.1,1", "--json", "--", "--data", "digits", "--limit-train", "100"]
    flags += ["--target-accuracy", "1"]  # which they miss, and are told of all the same
    arguments = ["-m", "distconv.bench", "accuracy", *flags, "--epochs", "2", "--batch-size", "10"]
    result = jobs.Job(0, arguments).finish(60)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["seed"] for row in rows] == [0, 1]
    assert rows[0]["accuracy"] != rows[1]["accuracy"]
    for row in rows:
        assert row["ranks"] == 2 and 0 < row["training_seconds"] < row["total_seconds"]
        assert set(row["targets"]) == ({"0.1"} if row["accuracy"] >= 0.1 else set())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--targets", "99"], "--targets"),
        (["--seeds", "0"], "--seeds 0"),
        (["--", "--epoch", "3"], "did you mean --epochs"),
        (["--epochs", "3"], "--epochs"),
        (["--", "--data", "digits", "--ensemble", "2"], "leave out --ensemble"),
        (["--", "--print-config"], "--print-config"),
    ],
)
def test_a_wrong_flag_of_either_is_one_sentence(flags: list[str], said: str) -> None:
    result = jobs.Job(0, ["-m", "distconv.bench", "accuracy", *flags]).finish(20)
    assert result.returncode == 2
    (sentence,) = result.stderr.splitlines()
    assert said in sentence
