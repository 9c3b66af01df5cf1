"""The networks that have a name: their tables, first weights, outputs and sizes; and networks of a user's own."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from distconv.config import MODELS
from distconv.data import mnist
from distconv.errors import UsageError
from distconv.kernels.cpu.device import Cpu
from distconv.nn.blocks import Branches
from distconv.nn.layers import Chain, Context, Dropout, inner_layers
from distconv.nn.networks import NETWORKS, build_network
from distconv.nn.normalization import Standardize
from distconv.nn.parameters import Parameters, count
from distconv.nn.pooling import GlobalAveragePool
from distconv.tasks.classify import Classification
from tests import reference

MNIST = (28, 28, 1)
DEEP_SHAPES = {
    "conv1": (3, 3, 1, 16),
    "conv2": (3, 3, 16, 16),
    "conv3": (3, 3, 16, 32),
    "conv4": (3, 3, 32, 32),
    "conv5": (3, 3, 32, 64),
    "conv6": (3, 3, 64, 64),
    "affine1": (1024, 50),
    "affine2": (50, 10),
}
SIMPLE_SHAPES = {"conv1": (5, 5, 1, 30), "affine1": (12 * 12 * 30, 100), "affine2": (100, 10)}
SHAPES = {"deepconvnet": DEEP_SHAPES, "simpleconvnet": SIMPLE_SHAPES}
both_networks = pytest.mark.parametrize("name", SHAPES)

CIFAR = (32, 32, 3)
# Trained parameters for 10 classes. VGG: what common implementations for CIFAR-10 have (9,231,114 and 14,728,266), less
# the biases before batch norm, one for each filter, which do nothing. ResNet: what they have. GoogLeNet: see below.
COUNTS = {
    "vgg11": 9_231_114 - (64 + 128 + 2 * 256 + 4 * 512),
    "vgg16": 14_728_266 - (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512),
    "resnet20": 272_474,
    "resnet56": 855_770,
    "resnet18": 11_173_962,
    "googlenet": 5_983_402,
}
deep_networks = pytest.mark.parametrize("name", COUNTS)


def initialized(name: str, dtype: type = np.float32):
    model, specs = build_network(name, MNIST, 10, (10,))
    parameters = Parameters(specs, dtype)
    parameters.initialize(0)
    return model, parameters


def test_no_network_goes_untested():
    assert sorted(NETWORKS) == sorted([*SHAPES, *COUNTS]) == sorted(MODELS)


@deep_networks
def test_deep_networks_have_the_parameters_that_others_count(name):
    _, specs = build_network(name, CIFAR, 10, (10,))
    assert Parameters(specs).trained_size == COUNTS[name]


def test_the_weights_of_inception_blocks_are_those_of_the_papers_table():
    """In thousands of 1,024. Some of its rows are up to 8 % off what their own columns of filters give."""
    table = [159, 380, 364, 437, 463, 580, 840, 1072, 1388]
    model, specs = build_network("googlenet", CIFAR, 10, (10,))
    blocks = [specs[name] for name, layer in model.layers if isinstance(layer, Branches)]
    filters = [
        {name: spec for name, spec in Parameters(block).specs.items() if name.endswith(".W")} for block in blocks
    ]
    assert [count(weights) / 1024 for weights in filters] == pytest.approx(table, rel=0.08)


def test_a_residual_network_has_the_layers_of_its_name():
    for name in ("resnet20", "resnet56", "resnet18"):
        convolutions = [
            path for path in Parameters(build_network(name, CIFAR, 10, (10,))[1]).specs
            if path.endswith(".W") and "shortcut" not in path
        ]  # fmt: skip
        assert f"resnet{len(convolutions)}" == name  # the affine layer among them


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name != "resnet20" else ()) for name in COUNTS]
)
def test_the_gradient_of_a_deep_network_is_its_slope(name):
    """Along one random direction through all that is trained, in float64."""
    model, specs = build_network(name, CIFAR, 10, (10,))
    parameters, rng = Parameters(specs, np.float64), np.random.default_rng(0)
    parameters.initialize(0)
    x, context = rng.random((2, *CIFAR)), Context(training=True, samples=np.arange(2), global_batch=2)
    y, backward = model.forward(x, parameters.values, context)
    u, v, saved = rng.standard_normal(y.shape), rng.standard_normal(parameters.size), parameters.vector.copy()
    backward(u, parameters.grads, False)
    for untrained in parameters.runs(lambda spec: not spec.trained):
        v[untrained] = 0
    outputs = []
    for step in (1e-8, -1e-8):
        parameters.vector[...] = saved + step * v
        outputs.append(float(np.vdot(u, model.forward(x, parameters.values, context)[0])))
    slope = (outputs[0] - outputs[1]) / 2e-8
    assert float(v @ parameters.gradient) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("name", ["vgg11", "resnet20", "googlenet"])
def test_evaluation_of_a_deep_network_is_training_where_running_statistics_are_the_batchs(name):
    """With a momentum of 1, they are after one step. So filters into which a normalisation is folded do the same."""
    model, specs = build_network(name, CIFAR, 10, (10,))
    parameters = Parameters(specs)
    parameters.initialize(0)
    x = np.random.default_rng(0).random((4, *CIFAR), np.float32)
    context = Context(training=True, samples=np.arange(4), global_batch=4)
    without_dropout = Chain.named((n, layer) for n, layer in model.layers if not isinstance(layer, Dropout))
    scores, backward = without_dropout.forward(x, parameters.values, context)
    backward(np.zeros_like(scores), parameters.grads, False)
    for part in parameters.runs(lambda spec: not spec.trained):
        parameters.vector[part] += 10 * parameters.gradient[part]  # of which momentum took a tenth
    for path, view in parameters.named(parameters.vector).items():
        if path.endswith(".variance"):  # the batch's own is not the unbiased one
            view *= 1 - 1 / (view_pixels(model, path) * len(x))
    evaluated, _ = without_dropout.forward(x, parameters.values, Context(training=False))
    np.testing.assert_allclose(evaluated, scores, rtol=0, atol=2e-3 * np.abs(scores).max())


def view_pixels(model, path):
    """How many pixels of an image the layer with this variance sees."""
    sizes = {".".join(names): math.prod(shape[:-1]) for names, shape in leaf_shapes(model, CIFAR)}
    return sizes[path.removesuffix(".variance")]


def leaf_shapes(layer, shape, names=()):
    """The names and the output shape of each layer that is made of no others."""
    if isinstance(layer, Chain):
        for name, one in layer.layers:
            yield from leaf_shapes(one, shape, (*names, name))
            shape = one.shapes(shape)[0]
    elif inner_layers(layer):
        for name, one in inner_layers(layer):
            yield from leaf_shapes(one, shape, (*names, name))
    else:
        yield names, layer.shapes(shape)[0]


@both_networks
def test_weights_have_the_shapes_of_the_source_with_filters_last_and_a_bias_each(name):
    _, parameters = initialized(name)
    found = {path: view.shape for path, view in parameters.named(parameters.vector).items()}
    expected = {}
    for layer, shape in SHAPES[name].items():
        expected |= {f"{layer}.W": shape, f"{layer}.b": shape[-1:]}
    assert list(found.items()) == list(expected.items())


def test_deepconvnet_has_123552_parameters():
    _, parameters = initialized("deepconvnet")
    assert parameters.size == parameters.vector.size == parameters.gradient.size == 123_552


def test_deepconvnet_has_the_output_shapes_of_the_source():
    shape, shapes = MNIST, {}
    for layer_name, layer in build_network("deepconvnet", MNIST, 10, (10,))[0].layers:
        shape, _ = layer.shapes(shape)
        shapes[layer_name] = shape
    assert shapes == {
        "conv1": (28, 28, 16),
        "conv2": (28, 28, 16),
        "maxpool1": (14, 14, 16),
        "conv3": (14, 14, 32),
        "conv4": (16, 16, 32),  # padded by 2
        "maxpool2": (8, 8, 32),
        "conv5": (8, 8, 64),
        "conv6": (8, 8, 64),
        "maxpool3": (4, 4, 64),
        "affine1": (50,),
        "dropout1": (50,),
        "affine2": (10,),
        "dropout2": (10,),
    }


@both_networks
def test_first_weights_have_their_deviation_and_biases_are_zero(name):
    _, parameters = initialized(name)
    for layer, shape in SHAPES[name].items():
        W, b = parameters.values[layer]["W"], parameters.values[layer]["b"]
        fan_in = W.size / shape[-1]
        deviation = np.sqrt(2 / fan_in) if name == "deepconvnet" else 0.01
        four_errors = 4 / np.sqrt(2 * W.size)  # of a sample's deviation: 1 % for the largest tensor
        assert W.std() == pytest.approx(deviation, rel=four_errors), layer
        assert W.mean() == pytest.approx(0, abs=4 * deviation / np.sqrt(W.size)), layer
        assert not b.any(), layer


def conv(x, params, pad):
    """Convolution and ReLU by the loops of the reference."""
    return np.maximum(reference.conv_forward(x, params["W"], params["b"], 1, pad), 0)


def pool(x):
    return reference.max_pool_forward(x, 2, 2, 0)


def affine(x, params):
    return reference.affine_forward(x.reshape(len(x), -1), params["W"], params["b"])


def deepconvnet_by_loops(x, p):
    x = pool(conv(conv(x, p["conv1"], 1), p["conv2"], 1))
    x = pool(conv(conv(x, p["conv3"], 1), p["conv4"], 2))
    x = pool(conv(conv(x, p["conv5"], 1), p["conv6"], 1))
    x = 0.5 * np.maximum(affine(x, p["affine1"]), 0)  # dropout, in evaluation
    return 0.5 * affine(x, p["affine2"])


def simpleconvnet_by_loops(x, p):
    x = pool(conv(x, p["conv1"], 0))
    return affine(np.maximum(affine(x, p["affine1"]), 0), p["affine2"])


@pytest.mark.parametrize(
    ("name", "by_loops"), [("deepconvnet", deepconvnet_by_loops), ("simpleconvnet", simpleconvnet_by_loops)]
)
def test_scores_in_evaluation_are_those_of_the_loops(name, by_loops):
    model, parameters = initialized(name, np.float64)
    parameters.vector += 0.01 * np.random.default_rng(0).standard_normal(parameters.size)  # biases too
    x = np.random.default_rng(1).random((1, *MNIST))
    scores, _ = model.forward(x, parameters.values, Context(training=False))
    expected = by_loops(x, parameters.values)
    assert scores.shape == (1, 10)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("shape", "classes"), [((32, 32, 3), 100), ((37, 50, 2), 2)])
def test_networks_take_other_images_and_numbers_of_classes(name, shape, classes):
    model, specs = build_network(name, shape, classes, (classes,))
    parameters = Parameters(specs)
    parameters.initialize(0)
    scores, _ = model.forward(np.ones((3, *shape), np.float32), parameters.values, Context(training=False))
    assert scores.shape == (3, classes)
    assert scores.dtype == np.float32


@both_networks
def test_images_too_small_for_the_network_are_refused_with_the_layer_named(name):
    with pytest.raises(UsageError, match=rf"--model {name} does not fit images of \(1, 1, 1\): .*\(.* 1 x 1"):
        build_network(name, (1, 1, 1), 10, (10,))


@pytest.fixture
def own_networks(tmp_path, monkeypatch):
    """A module of a user, in the current folder and no other place where Python looks."""
    (tmp_path / "own_networks.py").write_text(
        "from distconv.nn.layers import Affine, Chain, Conv\n"
        "def small(classes): return Chain(Conv(2), Affine(classes))\n"
        "def seven(classes): return Chain(Affine(7))\n"
        "def images(classes): return Chain(Conv(10))\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("own_networks", None)


def test_a_network_of_the_users_own_is_found_by_module_and_function(own_networks):
    model, specs = build_network("own_networks:small", (4, 5, 1), 6, (6,))
    assert [name for name, _ in model.layers] == ["conv1", "affine1"]
    assert specs["affine1"]["W"].shape == (2 * 3 * 2, 6)


def test_a_network_of_which_nothing_is_trained_is_refused():
    model = Chain(Standardize(), GlobalAveragePool())
    with pytest.raises(UsageError, match="nothing to train"):
        build_network("own:network", (8, 8, 10), 10, (10,), model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deepconvnett", "expected one of deepconvnet, simpleconvnet"),
        ("own_networks:seven", r"\(7,\), but the data set has 10 classes"),
        ("own_networks:images", r"\(26, 26, 10\), but the data set has 10 classes"),
        ("own_networks:absent", "own_networks has no function absent"),
        ("own_networks:number", "own_networks has no function number"),
        ("no_such_module:small", "no module no_such_module"),
        ("no_such_module.inner:small", "no module no_such_module"),
    ],
)
def test_a_network_that_cannot_be_used_is_a_usage_error(own_networks, name, message):
    with pytest.raises(UsageError, match=message):
        build_network(name, MNIST, 10, (10,))


def test_the_first_gradient_on_mnist_is_that_of_float64(mnist_folder: Path) -> None:
    """With the biases of the start, ReLU stands at its bend wherever an image is black.

    Elsewhere, one number that rounding brings to the other side of the bend changes a bias by up to 5e-3.
    """
    data = mnist.load_folder(mnist_folder)
    gradients = []
    for dtype in (np.float64, np.float32):
        model, specs = build_network("deepconvnet", (28, 28, 1), 10, (10,))
        parameters = Parameters(specs, dtype)
        parameters.initialize(0)
        context = Context(training=True, samples=np.arange(50), kernels=Cpu(dtype), global_batch=50)
        batch = data.batch("train", context.samples, context)
        Classification().gradient(model, parameters.values, parameters.grads, batch, context)
        gradients.append(parameters.named(parameters.gradient))
    for name, exact in gradients[0].items():
        assert np.linalg.norm(gradients[1][name] - exact) <= 1e-2 * np.linalg.norm(exact), name
