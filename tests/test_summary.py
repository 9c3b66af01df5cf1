"""`train --describe`: what a model is made of, before anything is computed."""

from __future__ import annotations

import pytest

from distconv.nn.blocks import Residual
from distconv.nn.layers import Affine, Chain
from distconv.nn.networks import NETWORKS, build_network, usual_image_shape
from distconv.nn.normalization import BatchNorm, ConvNorm
from distconv.nn.parameters import Parameters
from distconv.nn.summary import describe, norms_of_one_number, parts, table
from tests import jobs


@pytest.mark.parametrize("name", NETWORKS)
def test_the_parts_have_all_parameters_and_the_last_gives_the_scores(name: str) -> None:
    model, specs = build_network(name, usual_image_shape(name), 10, (10,))
    found = list(parts(model, usual_image_shape(name)))
    assert sum(part.parameters for part in found) == Parameters(specs).trained_size
    assert found[-1].output_shape == (10,)
    assert len({part.name for part in found}) == len(found)


# Multiplications of a forward pass as others count them, in millions: ResNet-20 41, ResNet-56 126, VGG-11 153, VGG-16
# 313 on 32 x 32 pixels, ResNet-18 556.
@pytest.mark.parametrize(
    ("name", "millions"), [("resnet20", 41), ("resnet56", 126), ("vgg11", 153), ("vgg16", 313), ("resnet18", 556)]
)
def test_the_operations_are_those_that_others_count(name: str, millions: int) -> None:
    model, _ = build_network(name, usual_image_shape(name), 10, (10,))
    assert sum(part.flops for part in parts(model, usual_image_shape(name))) / 2e6 == pytest.approx(millions, rel=0.01)


def test_a_line_of_the_table_is_a_layer() -> None:
    model, _ = build_network("resnet20", (32, 32, 3), 10, (10,))
    lines = [line.split() for line in table(model, (32, 32, 3)).splitlines()]
    assert lines[1][0] == "standardize1"
    assert lines[2] == [
        "convnorm1",
        "32",
        "x",
        "32",
        "x",
        "16",
        "464",
        "0.88",
        "128.0",
    ]  # 27 x 16 weights, 2 x 16 of norm
    assert ["residual4.shortcut", "16", "x", "16", "x", "32", "576", "0.26", "64.0"] in lines
    assert lines[-1][:2] == ["all", "272,474"]


def test_a_model_of_one_small_layer_has_a_name_and_operations() -> None:
    text = describe("mine:network", Affine(10), (28, 28, 1))
    assert "In memory besides: 31.4 kB of parameters" in text  # 0.0 MiB would tell nothing of a small one
    assert text.splitlines()[3].split() == ["affine", "10", "7,850", "0.02", "0.0"]
    assert "a training step takes some 0.05." in text


class Wrapped:
    """A user's own layer around one of ours, whose parameters lie one level down."""

    def shapes(self, input_shape):
        shape, specs = Affine(5).shapes(input_shape)
        return shape, {"inner": specs}

    forward = Affine(5).forward


def test_products_that_are_not_counted_are_named() -> None:
    shape = (4, 4, 1)
    assert "Not counted: the products of wrapped1, " in describe("mine:network", Chain(Wrapped(), Affine(3)), shape)
    assert "Not counted" not in describe("mine:network", Chain(BatchNorm(), Affine(3)), shape)


def test_the_command_describes_the_model_for_its_data_and_starts_nothing() -> None:
    for command in (("distconv.train",), ("distconv.launch", "-n", "2", "--")):
        result = jobs.run(0, "-m", *command, "--describe", "--data=digits", "--model=resnet20")
        assert result.returncode == 0 and result.stderr == ""
        assert result.stdout.startswith("resnet20 on images of 28 x 28 x 1, for each image:")
        assert "272,186" in result.stdout  # two channels less in the first filters
    told = jobs.run(2, "-m", "distconv.train", "--describe", "--model", "vgg11").stdout
    assert told.count("vgg11 on images of 32 x 32 x 3") == 1  # one rank tells


def test_a_model_that_does_not_fit_its_data_is_one_sentence() -> None:
    result = jobs.run(0, "-m", "distconv.train", "--describe", "--data=digits", "--model=vgg11")
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "--model vgg11 does not fit images of (28, 28, 1)" in result.stderr


def test_batch_norm_of_one_number_a_channel_is_found_wherever_it_is() -> None:
    model = Chain(ConvNorm(4), Residual(ConvNorm(4, stride=3, pad=1), ConvNorm(4, 1, 3)), Affine(8), BatchNorm())
    assert norms_of_one_number(model, (3, 3, 1)) == ["residual1.body", "residual1.shortcut", "batchnorm1"]
    assert norms_of_one_number(model, (3, 4, 1)) == ["batchnorm1"]
