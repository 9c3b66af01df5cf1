"""What is exported has the model's bits, under the source's names where these can tell it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from distconv.nn.layers import Affine, Chain, Conv, Layer
from distconv.nn.networks import build_network
from distconv.nn.parameters import Parameters, Shape, Specs
from distconv.run.folder import find_checkpoints
from distconv.run.layout import check, fill, places, to_file
from tests import jobs
from tests.test_commands import source_pickle
from tests.test_init import QUICK, STILL, tensors
from tests.test_train import train


def export(*arguments: str | Path, code: int = 0) -> str:
    """Standard error of the command."""
    result = jobs.run(0, "-m", "distconv.export", *arguments)
    assert result.returncode == code, result.stderr
    return result.stderr


def answers(*arguments: str | Path) -> list[object]:
    result = jobs.run(
        0, "-m", "distconv.evaluate", *arguments, "--data", "digits", "--precision", "float32", "--json", "--confusion"
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_pickle_through_a_run_and_an_export_has_its_bits(tmp_path: Path) -> None:
    """Its numbers are such as float32 holds; the run's steps are too small for it."""
    draw = np.random.default_rng(0).standard_normal
    whole = pickle.loads(source_pickle(tmp_path / "params.pkl").read_bytes())
    arrays = {name: (draw(array.shape) * 0.05).astype("f4").astype("f8") for name, array in whole.items()}
    source, out, npz = source_pickle(tmp_path / "params.pkl", **arrays), tmp_path / "run", tmp_path / "run.npz"
    assert train(2, *STILL, "--init", source, "--out", out).returncode == 0
    export(out, npz)
    with np.load(npz) as found:
        assert list(found) == [f"{kind}{k}" for k in range(1, 9) for kind in "Wb"]
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array.astype(np.float32), strict=True)
    direct = tmp_path / "direct.npz"
    export(source, direct)
    with np.load(direct) as found:
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array, strict=True)
    assert answers(source) == answers(npz) == answers(out)


def test_raw_and_averaged_weights_are_those_of_evaluate(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(2, *QUICK, "--lr", "0.01", "--ema", "0.9", "--out", out).returncode == 0
    kept = tensors(out)
    for flags, slot in (((), "ema"), (("--weights", "raw"), "value"), (("--weights", "averaged"), "ema")):
        export(out, tmp_path / "params.npz", *flags)  # over the one that is there
        with np.load(tmp_path / "params.npz") as found:
            np.testing.assert_array_equal(found["W1"], kept[f"{slot}/conv1.W"].transpose(3, 2, 0, 1), strict=True)
            # (H, W, C) rows of 12 x 12 images of 30 channels, one by one
            for h, w, c in ((0, 0, 0), (3, 7, 11), (11, 11, 29)):
                row = kept[f"{slot}/affine1.W"][(h * 12 + w) * 30 + c]
                np.testing.assert_array_equal(found["W2"][(c * 12 + h) * 12 + w], row)
    again = (tmp_path / "params.npz").read_bytes()
    export(find_checkpoints(out / "checkpoints")[0], tmp_path / "params.npz")
    assert (tmp_path / "params.npz").read_bytes() == again


@pytest.mark.parametrize("name", ["deepconvnet", "simpleconvnet", "resnet20", "googlenet"])
def test_every_network_comes_back_to_the_bit(name: str) -> None:
    shape = (28, 20, 3) if name == "deepconvnet" else (32, 32, 3)  # no two sizes alike, where that can be
    model, specs = build_network(name, shape, 10, (10,))
    first, second = Parameters(specs), Parameters(specs)
    first.vector[...] = np.random.default_rng(0).standard_normal(first.size)
    wanted = places(model, first, shape)
    arrays = to_file(first, wanted)
    assert ("W1" in arrays) == ("conv" in name)
    assert check(arrays, wanted, Path("a.npz")) == []
    fill(second, arrays, wanted, Path("a.npz"))
    np.testing.assert_array_equal(second.vector, first.vector)


class WithoutBias(Conv):
    """A user's own kind: it has other parameters than the one that it is derived from."""

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        shape, specs = super().shapes(input_shape)
        return shape, {"W": specs["W"]}


class OwnChain(Chain):
    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        shape, specs = super().shapes(input_shape)
        return shape, {"mine": specs}


@pytest.mark.parametrize(
    "model", [Chain(WithoutBias(4), Affine(3)), OwnChain(Conv(4), Affine(3))], ids=["conv", "chain"]
)
def test_a_network_with_a_users_own_kind_of_a_layer_keeps_its_own_names(model: Layer) -> None:
    parameters = Parameters(model.shapes((5, 5, 2))[1])
    assert list(to_file(parameters, places(model, parameters, (5, 5, 2)))) == list(parameters.specs)


def test_a_network_of_branches_keeps_its_own_names(tmp_path: Path) -> None:
    out, npz = tmp_path / "run", tmp_path / "params.npz"
    tiny = ("--data", "digits", "--limit-train", "4", "--batch-size", "4", "--epochs", "1", "--eval-samples", "4")
    assert train(2, *tiny, "--model", "resnet20", "--out", out).returncode == 0
    export(out, npz)
    kept = tensors(out)
    with np.load(npz) as found:
        assert {f"value/{name}" for name in found} == {name for name in kept if name.startswith("value/")}
        for name in found:
            np.testing.assert_array_equal(found[name], kept[f"value/{name}"], strict=True)
    again = tmp_path / "again"
    assert train(2, *tiny, "--lr", "1e-30", "--model", "resnet20", "--init", npz, "--out", again).returncode == 0
    np.testing.assert_array_equal(tensors(again)["value/convnorm1.W"], kept["value/convnorm1.W"])


def test_float64_stays_float64(tmp_path: Path) -> None:
    out, npz = tmp_path / "run", tmp_path / "params.npz"
    result = train(1, *QUICK, "--wire", "float64", "--lr", "0.01", "--out", out)
    assert result.returncode == 0, result.stderr
    export(out, npz)
    with np.load(npz) as found:
        np.testing.assert_array_equal(found["b3"], tensors(out)["value/affine2.b"], strict=True)
        assert found["b3"].dtype == np.float64


def test_what_cannot_be_written_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    weights = source_pickle(tmp_path / "params.pkl", epoch=3)
    assert "passed over 'epoch'" in export(weights, tmp_path / "params.npz")
    assert export(weights, tmp_path / "params.pkl", code=2).count("\n") == 1
    assert export(weights, weights / "params.npz", code=73).count("\n") == 2  # what was passed over comes first
    (tmp_path / "folder.npz").mkdir()
    export(weights, tmp_path / "folder.npz", code=73)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.npz", "params.npz", "params.pkl"]
    result = jobs.run(2, "-m", "distconv.export", tmp_path / "none", tmp_path / "b.npz")
    assert result.returncode == 66 and result.stderr.count("\n") == 1
