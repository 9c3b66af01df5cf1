"""The programs around training: evaluate and misclassified."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from distconv.run.checkpoint import find_checkpoints
from distconv.run.log import read_metrics
from tests import jobs

QUICK = ("--data", "digits", "--limit-train", "300", "--batch-size", "30", "--epochs", "2")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert jobs.run(2, "-m", "distconv.train", *QUICK, "--out", out).returncode == 0
    return out


def test_evaluate_counts_what_training_counted_in_three_precisions(run_folder: Path) -> None:
    checkpoint = find_checkpoints(run_folder / "checkpoints")[0]
    result = jobs.run(3, "-m", "distconv.evaluate", checkpoint, "--json")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["precision"] for row in rows] == ["float64", "float32", "float16"]
    final = read_metrics(run_folder / "metrics.jsonl")[-1]
    assert rows[1]["correct"] == final["correct"] and rows[1]["total"] == 360
    for row in rows:
        assert row["test_accuracy"] == row["correct"] / row["total"]
        assert abs(row["correct"] - final["correct"]) <= 3  # rounding moves a doubtful image or two


def test_evaluate_prints_a_table_for_people(run_folder: Path) -> None:
    checkpoint = find_checkpoints(run_folder / "checkpoints")[0]
    lines = jobs.run(0, "-m", "distconv.evaluate", checkpoint, "--precision", "float16").stdout.splitlines()
    assert len(lines) == 2 and lines[1].startswith("float16") and "%" in lines[1]


def test_misclassified_prints_and_draws_the_first_wrong_images(run_folder: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoints(run_folder / "checkpoints")[0]
    png = tmp_path / "wrong.png"
    result = jobs.run(2, "-m", "distconv.misclassified", checkpoint, "--png", png)
    assert result.returncode == 0, result.stderr
    final = read_metrics(run_folder / "metrics.jsonl")[-1]
    head, *pairs, tail = result.stdout.splitlines()
    assert head.startswith(f"{final['total'] - final['correct']} of 360") and str(png) in tail
    assert 1 <= len(pairs) <= 20
    for line in pairs:
        label, inference = map(int, line.split("(")[1].rstrip(")").split(","))
        assert label != inference and {label, inference} <= set(range(10))
    assert matplotlib.image.imread(png).std() > 0.05


CHANGING = """
import numpy as np, os
from distconv.data.dataset import Dataset
from distconv.nn.layers import Affine, Chain
def network(classes): return Chain(Affine(classes))
def mine():
    value, classes = (int(os.environ[name]) for name in ("VALUE", "CLASSES"))
    images, labels = np.full((40, 5, 5), 7, np.uint8), np.arange(40, dtype=np.uint8) % 3
    images[30] = value
    return Dataset("mine", images, labels, images[:9], labels[:9], classes)
"""


@pytest.fixture(scope="module")
def trained_on_mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changing")
    (folder / "changing.py").write_text(CHANGING)
    own = ("--data", "changing:mine", "--model", "changing:network", "--batch-size", "9", "--limit-train", "35")
    environment = {"PYTHONPATH": str(folder), "VALUE": "7", "CLASSES": "3"}
    result = jobs.run(2, "-m", "distconv.train", *own, "--epochs", "1", "--out", folder / "run", **environment)
    assert result.returncode == 0, result.stderr
    return find_checkpoints(folder / "run" / "checkpoints")[0]


@pytest.mark.parametrize(
    ("command", "changed", "flags", "words"),
    [
        ("evaluate", {"VALUE": "8"}, (), "which is now"),
        ("misclassified", {"VALUE": "8"}, (), "which is now"),
        ("evaluate", {"VALUE": "8"}, ("--data", "changing:mine"), ""),
        ("misclassified", {"CLASSES": "4"}, ("--data", "changing:mine"), "3 classes of images of (5, 5, 1), but chang"),
    ],
)
def test_a_data_set_that_has_changed_since_training_is_told_unless_it_is_named(
    trained_on_mine: Path, tmp_path: Path, command: str, changed: dict[str, str], flags: tuple[str, ...], words: str
) -> None:
    environment = {"VALUE": "7", "CLASSES": "3", **changed, "PYTHONPATH": str(trained_on_mine.parents[2])}
    png = ("--png", tmp_path / "wrong.png") if command == "misclassified" else ()
    result = jobs.run(2, "-m", f"distconv.{command}", trained_on_mine, *flags, *png, **environment)
    assert result.returncode == (78 if words else 0), result.stderr
    assert words in result.stderr and result.stderr.count("\n") == bool(words)


def source_pickle(path: Path, **changed: object) -> Path:
    """A file of the source: float64 arrays W1 to W8 and b1 to b8."""
    shapes = [(16, 1, 3, 3), (16, 16, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3)]
    random = np.random.default_rng(0)
    arrays: dict[str, object] = {}
    for i, shape in enumerate([*shapes, (1024, 50), (50, 10)], start=1):
        arrays[f"W{i}"] = random.standard_normal(shape) * 0.05
        arrays[f"b{i}"] = np.zeros(shape[0] if len(shape) == 4 else shape[1])
    path.write_bytes(pickle.dumps({**arrays, **changed}))
    return path


def test_evaluate_reads_the_sources_pickles(tmp_path: Path) -> None:
    params = source_pickle(tmp_path / "params.pkl")
    result = jobs.run(2, "-m", "distconv.evaluate", params, "--data", "digits", "--json", "--precision", "float64")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["total"] == 360


class Hostile:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.canary,)


def test_a_bad_model_file_is_one_sentence_and_runs_nothing(tmp_path: Path) -> None:
    hostile = source_pickle(tmp_path / "hostile.pkl", W3=Hostile(tmp_path / "canary"))
    wrong = source_pickle(tmp_path / "wrong.pkl", W3=np.zeros((1, 2, 3, 4)))
    for command, path, code in (
        ("evaluate", hostile, 65),
        ("misclassified", wrong, 78),
        ("evaluate", tmp_path / "none.pkl", 66),
    ):
        result = jobs.run(2, "-m", f"distconv.{command}", path, "--data", "digits")
        assert result.returncode == code, result.stderr
        assert result.stderr.count("\n") == 1 and str(path) in result.stderr
    assert not (tmp_path / "canary").exists()
