"""The programs around training: evaluate and misclassified."""

from __future__ import annotations

import functools
import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from distconv.data import digits
from distconv.kernels.cpu.device import Cpu
from distconv.nn.layers import Context
from distconv.nn.networks import build_network
from distconv.nn.parameters import Parameters
from distconv.pictures.answers import draw_augmented, draw_confusion, draw_mistakes
from distconv.pictures.style import save
from distconv.run.checkpoint import load_checkpoint
from distconv.run.folder import find_checkpoints
from distconv.run.log import read_metrics
from tests import jobs

QUICK = ("--data", "digits", "--limit-train", "300", "--batch-size", "30", "--epochs", "2")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert jobs.run(2, "-m", "distconv.train", *QUICK, "--out", out).returncode == 0
    return out


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of another network, which keeps an average of its weights."""
    out = tmp_path_factory.mktemp("averaged") / "run"
    more = ("--model", "simpleconvnet", "--ema", "0.8", "--out", out)
    assert jobs.run(2, "-m", "distconv.train", *QUICK, *more).returncode == 0
    return out


@functools.cache
def probabilities(run: Path) -> np.ndarray:
    """What the newest model of a run gives for each test digit -> (360, 10): softmax by hand, a digit at a time."""
    checkpoint = load_checkpoint(find_checkpoints(run / "checkpoints")[0])
    model, specs = build_network(checkpoint.config.model, (28, 28, 1), 10, (10,))
    parameters = Parameters(specs)
    for name, view in parameters.named(parameters.vector).items():
        view[...] = checkpoint.tensors[f"value/{name}"]
    x = digits.load().test_images.astype(np.float32) / 255
    rows = [
        model.forward(image[np.newaxis], parameters.values, Context(False, np.zeros(1, np.int32), kernels=Cpu()))[0][0]
        for image in x
    ]
    powers = [[math.exp(score - max(row)) for score in row.tolist()] for row in rows]
    return np.array([[power / sum(row) for power in row] for row in powers])


def evaluate(ranks: int, *arguments: str | Path) -> list[dict[str, Any]]:
    result = jobs.run(ranks, "-m", "distconv.evaluate", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_evaluate_counts_what_training_counted_in_three_precisions(run_folder: Path) -> None:
    rows = evaluate(3, find_checkpoints(run_folder / "checkpoints")[0])
    assert [row["precision"] for row in rows] == ["float32", "float64", "float16"]
    final = read_metrics(run_folder / "metrics.jsonl")[-1]
    assert rows[0]["correct"] == final["correct"] and rows[0]["total"] == 360
    for row in rows:
        assert list(row) == ["precision", "test_accuracy", "correct", "total"]
        assert row["test_accuracy"] == row["correct"] / row["total"]
        assert abs(row["correct"] - final["correct"]) <= 3  # rounding moves a doubtful image or two


@pytest.mark.parametrize("ranks", [0, 3])
def test_an_ensemble_averages_the_probabilities_of_its_models(run_folder: Path, averaged: Path, ranks: int) -> None:
    checkpoint = find_checkpoints(run_folder / "checkpoints")[0]
    *rows, last = evaluate(ranks, checkpoint, averaged, averaged, "--weights", "raw", "--confusion")
    mean = np.zeros((360, 10))
    labels, names = digits.load().test_labels.tolist(), [str(checkpoint), str(averaged), str(averaged), "ensemble"]
    singles = [probabilities(run_folder), probabilities(averaged), probabilities(averaged)]
    for single in singles:
        mean += single / 3
    expected = [sum(np.argmax(p[i]) == label for i, label in enumerate(labels)) for p in (*singles, mean)]
    assert [(row["model"], row["precision"], row["correct"]) for row in rows] == [
        (name, "float32", correct) for name, correct in zip(names, expected, strict=True)
    ]
    confusion = [[0] * 10 for _ in range(10)]
    for row, label in zip(mean, labels, strict=True):
        confusion[label][int(np.argmax(row))] += 1
    assert last["confusion"] == confusion
    assert last["calibration_error"] == pytest.approx(calibration_error(mean, labels), abs=1e-6)


def calibration_error(p: np.ndarray, labels: list[int]) -> float:
    """Guo et al. 2017, equation 3: a loop over 15 bins (low, high]."""
    error = 0.0
    for m in range(15):
        inside = [i for i, row in enumerate(p) if m / 15 < max(row) <= (m + 1) / 15]
        if inside:
            accuracy = sum(int(np.argmax(p[i])) == labels[i] for i in inside) / len(inside)
            error += len(inside) / len(p) * abs(accuracy - sum(max(p[i]) for i in inside) / len(inside))
    return error


def test_the_average_of_the_weights_is_judged_where_there_is_one(run_folder: Path, averaged: Path) -> None:
    final = read_metrics(averaged / "metrics.jsonl")[-1]
    scores = {"raw": final["test_accuracy"], "averaged": final["ema_test_accuracy"]}
    assert scores["raw"] != scores["averaged"]  # else this would show nothing
    for weights, *flags in (["averaged"], ["raw", "--weights", "raw"]):
        result = jobs.run(2, "-m", "distconv.evaluate", averaged, "--json", "--precision", "float32", *flags)
        assert json.loads(result.stdout)["test_accuracy"] == scores[weights]
        assert ("average of the weights" in result.stderr) == (weights == "averaged")
    for ranks, command in ((2, "evaluate"), (0, "misclassified")):
        result = jobs.run(ranks, "-m", f"distconv.{command}", run_folder, "--weights", "averaged")
        assert result.returncode == 2 and "no average of the weights" in result.stderr.splitlines()[-1]
        assert result.stdout == ""


def test_a_runs_folder_stands_for_its_newest_good_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    older, newest = (find_checkpoints(run_folder / "checkpoints")[n] for n in (1, 0))
    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    for path in (older, newest):
        shutil.copy(path, copy / "checkpoints")
    quick = ("--precision", "float32", "--confusion")
    of_older, of_newest = evaluate(2, older, *quick), evaluate(2, newest, *quick)
    assert evaluate(2, copy, *quick) == of_newest != of_older
    (copy / "checkpoints" / newest.name).write_bytes(newest.read_bytes()[:-1])
    result = jobs.run(2, "-m", "distconv.evaluate", copy, "--json", *quick)
    assert [json.loads(line) for line in result.stdout.splitlines()] == of_older
    assert newest.name in result.stderr.splitlines()[0] and older.name in result.stderr.splitlines()[1]
    result = jobs.run(0, "-m", "distconv.evaluate", tmp_path)
    assert result.returncode == 66 and result.stderr.count("\n") == 1 and str(tmp_path) in result.stderr


def test_evaluate_prints_tables_for_people(run_folder: Path, averaged: Path, tmp_path: Path) -> None:
    result = jobs.run(0, "-m", "distconv.evaluate", run_folder, "--precision", "float16", "--precision", "float32")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["precision", "float32", "float16"] and "%" in lines[1]
    labels = digits.load().test_labels
    for label, line in enumerate(lines[-12:-2]):
        number, accuracy, *counts = line.replace(".  ", "0  ").replace(" .", " 0").split()
        assert int(number) == label and sum(map(int, counts)) == np.count_nonzero(labels == label)
        assert float(accuracy[:-1]) == pytest.approx(100 * int(counts[label]) / sum(map(int, counts)), abs=0.005)
    assert lines[-1].startswith("expected calibration error: ")
    png = tmp_path / "confusion.png"
    result = jobs.run(2, "-m", "distconv.evaluate", run_folder, averaged, "--png", png)
    assert [line.split()[-1] for line in result.stdout.splitlines()[1:4]] == [
        str(run_folder),
        str(averaged),
        "ensemble",
    ]
    assert matplotlib.image.imread(png).std() > 0.05
    result = jobs.run(0, "-m", "distconv.misclassified", run_folder, "--png", tmp_path / "none" / "a.png")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 73 and "none/a.png: there is no folder" in line and not result.stdout


@pytest.mark.parametrize("flags", [(), ("--most", "7", "--hardest")])
def test_misclassified_prints_and_draws_the_first_or_the_hardest_images(
    run_folder: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    png = tmp_path / "wrong.png"
    result = jobs.run(2, "-m", "distconv.misclassified", run_folder, "--png", png, *flags)
    assert result.returncode == 0, result.stderr
    p, labels = probabilities(run_folder), digits.load().test_labels.tolist()
    wrong = [(max(row), i) for i, row in enumerate(p) if np.argmax(row) != labels[i]]
    head, *found, tail = result.stdout.splitlines()
    which = "the 7 hardest" if flags else "the first 20"
    shown = sorted(wrong, key=lambda pair: -pair[0])[:7] if flags else wrong[:20]
    assert head == f"{len(wrong)} of 360 test images wrong; {which}" and str(png) in tail
    assert found == [f"{sure:>7.2%}  image {i}: {(labels[i], int(np.argmax(p[i])))}" for sure, i in shown]
    assert matplotlib.image.imread(png).std() > 0.05


def test_misclassified_shows_so_many_at_most(run_folder: Path) -> None:
    result = jobs.run(0, "-m", "distconv.misclassified", run_folder, "--most", "0")
    assert result.returncode == 2 and "from 1 to 200" in result.stderr


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_page_of_few_mistakes_holds_them_all(count: int, tmp_path: Path) -> None:
    images = np.zeros((count, 28, 28, 1), np.uint8)
    images[:, 8:20, 8:20] = 255
    save(draw_mistakes(images, ["(1, 2)"] * count, f"{count} wrong"), tmp_path / "page.png")
    pixels = matplotlib.image.imread(tmp_path / "page.png")[..., 0]
    squares = np.flatnonzero(np.diff((pixels < 0.5).sum(axis=0) > 50, prepend=False, append=False))
    assert len(squares) == 2 * count  # each has a left and a right side


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_any_channels_and_range_are_drawn(
    channels: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = np.full((2, 8, 8, channels), -3, np.float32)
    images[:, 2:6, 2:6] = 5
    save(draw_mistakes(images, ["(0, 1)"] * 2, ""), tmp_path / "page.png")
    save(draw_augmented([images], ""), tmp_path / "augmented.png")
    dark = (matplotlib.image.imread(tmp_path / "page.png")[..., :3] < 0.1).all(axis=-1)
    assert dark.sum() > 1000  # the squares, or where there are colours, what is around them
    assert not caplog.messages  # Matplotlib's, that it has cut off what is beyond 0 to 1


def test_long_captions_stand_apart_and_colours_are_in_colour(tmp_path: Path) -> None:
    images = np.zeros((5, 32, 32, 3), np.uint8)
    images[np.arange(3), ..., np.arange(3)] = 255
    save(draw_mistakes(images, ["(automobile, automobile)"] * 5, ""), tmp_path / "page.png")
    picture = matplotlib.image.imread(tmp_path / "page.png")[..., :3]
    for colour in np.eye(3):
        assert (picture == colour).all(axis=-1).sum() > 1000
    ink = (picture < 0.9).any(axis=-1)
    rows = np.flatnonzero(ink.any(axis=1))
    captions = ink[rows[0] : rows[0] + 18].any(axis=0)  # some rows of their letters
    gaps = np.diff(np.flatnonzero(captions))
    assert (gaps > 15).sum() == 4  # letters and words are nearer to one another
    assert not captions[:3].any() and not captions[-3:].any()


@pytest.mark.parametrize("name", ["automobile", "W" * 20, "a $^{$ of 20 letters"])
def test_names_of_classes_are_not_cut_off(tmp_path: Path, name: str) -> None:
    save(draw_confusion(np.eye(10, dtype=np.int64), [name] * 10, "$title^{$"), tmp_path / "page.png")
    ink = matplotlib.image.imread(tmp_path / "page.png")[..., :3].min(axis=-1) < 0.9
    assert not (ink[[0, -1]].any() or ink[:, [0, -1]].any())
    save(draw_confusion(np.eye(10, dtype=np.int64), None, "$title^{$"), tmp_path / "numbers.png")
    assert len(ink) > len(matplotlib.image.imread(tmp_path / "numbers.png"))  # the squares keep their size


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


def test_evaluate_tells_of_scores_that_overflow_and_takes_those_that_did_not(tmp_path: Path) -> None:
    W8, b8 = np.zeros((50, 10)), np.full(10, -1.0)
    W8[:, 9], b8[3] = np.tile([1e6, -1e6], 25), 1.0  # in float16, class 9 scores infinity less infinity
    weights = source_pickle(tmp_path / "params.pkl", W8=W8, b8=b8)
    flags = ("--data", "digits", "--precision", "float16", "--precision", "float32", "--json")
    result = jobs.run(2, "-m", "distconv.evaluate", weights, *flags)
    threes = int(np.count_nonzero(digits.load().test_labels == 3))
    assert [json.loads(line)["correct"] for line in result.stdout.splitlines()][1] == threes
    assert "too large for float16: scores of 360 of 360 test images" in result.stderr
    assert "float32" not in result.stderr and "Warning" not in result.stderr


@pytest.mark.slow
def test_models_of_other_data_do_not_judge_together(run_folder: Path, trained_on_mine: Path, tmp_path: Path) -> None:
    own = {"PYTHONPATH": str(trained_on_mine.parents[2]), "VALUE": "7", "CLASSES": "3"}
    other = tmp_path / "run"
    short = ("--data", "digits", "--limit-train", "30", "--model", "simpleconvnet", "--epochs", "1")
    assert jobs.run(2, "-m", "distconv.train", *short, "--out", other).returncode == 0
    for second, words in ((trained_on_mine, "3 classes of images of (5, 5, 1)"), (other, "name one for all by --data")):
        result = jobs.run(2, "-m", "distconv.evaluate", run_folder, second, **own)
        assert result.returncode == 78 and words in result.stderr.splitlines()[-1] and result.stdout == ""
    params = source_pickle(tmp_path / "params.pkl")
    rows = evaluate(2, params, run_folder, other, "--data", "digits")
    assert [row["model"] for row in rows] == [str(params), str(run_folder), str(other), "ensemble"]


class Hostile:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.canary,)


def test_a_bad_model_file_is_one_sentence_and_runs_nothing(tmp_path: Path) -> None:
    hostile = source_pickle(tmp_path / "hostile.pkl", W3=Hostile(tmp_path / "canary"))
    picture = tmp_path / "params.png"
    matplotlib.image.imsave(picture, np.eye(3))
    wrong = source_pickle(tmp_path / "wrong.pkl", W3=np.zeros((1, 2, 3, 4)))
    for ranks, command, path, code in (
        (2, "evaluate", hostile, 65),
        (2, "misclassified", wrong, 78),
        (0, "misclassified", picture, 65),
        (2, "evaluate", tmp_path / "none.pkl", 66),
        (0, "evaluate", tmp_path / ("x" * 300), 66),  # no name that a file can have
    ):
        result = jobs.run(ranks, "-m", f"distconv.{command}", path, "--data", "digits")
        assert result.returncode == code, result.stderr
        assert result.stderr.count("\n") == 1 and str(path) in result.stderr
    assert not (tmp_path / "canary").exists()
