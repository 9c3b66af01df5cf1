"""--init: a new run starts from weights that are there, on all ranks alike, and then is a run like any other."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distconv.data import digits
from distconv.data.shard import epoch_order
from distconv.run.checkpoint import load_checkpoint
from distconv.run.folder import find_checkpoints
from tests import jobs
from tests.test_commands import source_pickle
from tests.test_pickled import SIMPLE, simple_scores
from tests.test_train import metrics, parameters, train, without_its_end

# A rate of which nothing is left in float32, so the weights at the end are those of the start.
STILL = ("--data", "digits", "--limit-train", "60", "--batch-size", "30", "--epochs", "1", "--lr", "1e-30")
QUICK = (*STILL[:-2], "--model", "simpleconvnet")


def tensors(out: Path) -> dict[str, np.ndarray]:
    return dict(load_checkpoint(find_checkpoints(out / "checkpoints")[0]).tensors)


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pickle of the source's SimpleConvNet."""
    path = tmp_path_factory.mktemp("source") / "params.pkl"
    path.write_bytes(pickle.dumps({**SIMPLE, "epoch": 3}))
    return path


@pytest.mark.parametrize("ranks", [0, 3])
def test_a_run_starts_from_the_sources_weights(simple: Path, tmp_path: Path, ranks: int) -> None:
    """The loss of the first step is that of the slow loops on the same images, so every rank has the weights."""
    out = tmp_path / "run"
    result = train(ranks, *QUICK, "--lr", "0.001", "--wire", "float32", "--init", simple, "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("passed over 'epoch', for which") == 1
    order = epoch_order(0, 0, 60)
    images, labels = digits.load().train_images[order] / 255, digits.load().train_labels[order]
    scores = simple_scores(images[:30].transpose(0, 3, 1, 2), SIMPLE)
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    losses = -np.log(powers / powers.sum(axis=1, keepdims=True))[np.arange(30), labels[:30]]
    assert metrics(out, "step")[0]["train_loss"] == pytest.approx(losses.mean(), rel=1e-4)


def test_it_belongs_to_the_run_and_is_not_read_again(tmp_path: Path) -> None:
    weights, whole = source_pickle(tmp_path / "params.pkl"), tmp_path / "whole"
    first = train(2, *STILL, "--lr", "0.001", "--epochs", "2", "--init", weights, "--out", whole)
    assert first.returncode == 0 and "starting from the weights of" in first.stdout
    out = without_its_end(whole, tmp_path / "run", 1)
    other = tmp_path / "other.pkl"
    weights.rename(other)  # nobody needs it any more
    spelled = os.path.relpath(weights, jobs.ROOT)  # the same file, as another folder calls it
    more = train(2, *STILL, "--lr", "0.001", "--epochs", "2", "--init", spelled, "--out", out)
    assert more.returncode == 0 and "starting from" not in more.stdout, more.stderr
    assert parameters(out) == parameters(whole)
    for flags, words in ((("--init", other), f"init = {weights}, not {other}"), ((), f"init = {weights}, not none")):
        result = train(2, *STILL, "--lr", "0.001", "--epochs", "3", *flags, "--out", out)
        assert result.returncode == 78 and words in result.stderr and result.stderr.count("\n") == 1
    weights.write_bytes(other.read_bytes())
    assert "the same bits: 4 steps" in jobs.run(2, "-m", "distconv.reproduce", whole).stdout


def test_of_a_run_with_an_average_that_is_taken_and_the_new_average_starts_there(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    assert train(2, *QUICK, "--lr", "0.01", "--ema", "0.9", "--out", old).returncode == 0
    result = train(2, *QUICK, "--lr", "1e-30", "--ema", "0.5", "--init", old, "--out", new)
    assert result.returncode == 0 and "their average" in result.stdout, result.stderr
    before, after = tensors(old), tensors(new)
    for name in ("conv1.W", "affine2.b"):
        assert (before[f"ema/{name}"] != before[f"value/{name}"]).any()
        for slot in ("value", "ema"):
            np.testing.assert_array_equal(after[f"{slot}/{name}"], before[f"ema/{name}"])


def test_members_of_an_ensemble_start_from_the_same_weights(tmp_path: Path) -> None:
    weights, out = source_pickle(tmp_path / "params.pkl"), tmp_path / "two"
    result = train(2, *STILL, "--ensemble", "2", "--init", weights, "--out", out)
    assert result.returncode == 0, result.stderr
    first, second = (tensors(out / f"member-{n}") for n in range(2))
    for name in ("value/conv1.W", "value/affine1.W"):
        np.testing.assert_array_equal(first[name], second[name])
    W1 = pickle.loads(weights.read_bytes())["W1"]
    np.testing.assert_array_equal(first["value/conv1.W"], W1.transpose(2, 3, 1, 0).astype(np.float32))


OWN = """
from distconv.nn.layers import Affine, Chain, Conv, MaxPool
from distconv.nn.normalization import Standardize
def network(classes): return Chain(Standardize(), Conv(4, size=5, relu=True), MaxPool(), Affine(classes))
"""


def test_what_is_not_trained_keeps_its_first_values_where_the_file_has_none(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    draw = np.random.default_rng(0).standard_normal
    arrays = {"W1": draw((4, 1, 5, 5)), "b1": draw(4), "W2": draw((4 * 12 * 12, 10)), "b2": draw(10)}
    path, out = tmp_path / "params.pkl", tmp_path / "run"
    path.write_bytes(pickle.dumps(arrays))
    own: dict[str, Any] = {"PYTHONPATH": str(tmp_path)}
    result = train(2, *STILL, "--model", "own:network", "--init", path, "--out", out, **own)
    assert result.returncode == 0, result.stderr
    found, pixels = tensors(out), digits.load().train_images[:60] / 255
    assert found["value/standardize1.mean"] == pytest.approx(pixels.mean(), rel=1e-5)
    assert found["value/standardize1.deviation"] == pytest.approx(pixels.std(), rel=1e-5)
    np.testing.assert_array_equal(found["value/conv1.W"], arrays["W1"].transpose(2, 3, 1, 0).astype(np.float32))
    judged = ("--data", "digits", "--model", "own:network", "--precision", "float32", "--json")
    result = jobs.run(0, "-m", "distconv.evaluate", path, *judged, **own)
    assert result.returncode == 0 and json.loads(result.stdout)["total"] == 360, result.stderr


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"W3": np.zeros((1, 2, 3, 4))}, 78, "W3 is (1, 2, 3, 4), this model needs (32, 16, 3, 3)"),
        ({"b1": np.full(16, 1e39)}, 78, "too large for float32"),
        ({"b1": "text"}, 65, "'b1' is no array of floats"),
    ],
)
def test_weights_that_cannot_be_are_refused_once(
    tmp_path: Path, changed: dict[str, object], code: int, words: str
) -> None:
    weights = source_pickle(tmp_path / "params.pkl", **changed)
    result = train(2, *STILL, "--init", weights, "--out", tmp_path / "run")
    assert result.returncode == code and words in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_a_file_that_is_not_there_is_told_with_the_name_that_was_meant(tmp_path: Path) -> None:
    source_pickle(tmp_path / "params.pkl")
    result = train(2, *STILL, "--init", tmp_path / "param.pkl", "--out", tmp_path / "run")
    assert result.returncode == 66 and f"did you mean {tmp_path / 'params.pkl'}?" in result.stderr
    assert result.stderr.count("\n") == 1


def test_nobody_resumes_from_weights_alone(tmp_path: Path) -> None:
    weights = source_pickle(tmp_path / "params.pkl")
    for given in (weights, tmp_path):
        result = train(2, *STILL, "--resume", given, "--out", tmp_path / "run")
        assert result.returncode == 2 and f"--init {given}" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_where_the_data_are_others_the_model_is_not_blamed_and_a_relative_path_is_told_of(tmp_path: Path) -> None:
    images, labels = np.zeros((60, 9, 7), np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "own.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    own, new = tmp_path / "own", tmp_path / "new"
    few = (*QUICK, "--model", "deepconvnet", "--lr", "0.01")
    there = f"import os, runpy; os.chdir({str(tmp_path)!r}); runpy.run_module('distconv.train', run_name='__main__')"
    result = jobs.run(0, "-c", there, *few, "--data", "own.npz", "--out", own, PYTHONPATH=str(jobs.ROOT))
    assert result.returncode == 0, result.stderr

    other = train(2, *few, "--data", "digits", "--init", own, "--out", new)
    assert other.returncode == 78 and "--model" not in other.stderr and other.stderr.count("\n") == 1, other.stderr
    assert "was trained on 3 classes of images of (9, 7, 1), but this run's data has 10 classes" in other.stderr

    for ranks, command in ((0, "reproduce"), (2, "evaluate")):  # in another folder
        lost = jobs.run(ranks, "-m", f"distconv.{command}", own)
        assert lost.returncode == 66 and "own.npz is not a file" in lost.stderr
        assert "the run names it from the folder where it was started: start this there, too" in lost.stderr
