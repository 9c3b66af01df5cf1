"""Layers and chains of them: gradients against slopes, dropout that belongs to samples, errors that name a layer."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from distconv.errors import UsageError
from distconv.nn.blocks import Branches, Residual
from distconv.nn.checked import checked
from distconv.nn.fusion import fused
from distconv.nn.layers import Affine, Chain, Context, Conv, Dropout, Layer, MaxPool, ReLU
from distconv.nn.networks import deepconvnet, simpleconvnet
from distconv.nn.normalization import BatchNorm, ConvNorm, Standardize
from distconv.nn.parameters import Parameters
from distconv.nn.pooling import AveragePool, GlobalAveragePool
from distconv.run.spans import Spans, traced

# Of the central difference. Outputs are linear in a tensor until a ReLU or a pool changes sides, so the step is small.
STEP = 1e-7
SAMPLES = np.array([40, 7, 59_999, 12, 3])


def training(N: int = len(SAMPLES)) -> Context:
    return Context(training=True, seed=1, step=5, samples=SAMPLES[:N])


def built(model: Layer, input_shape: tuple[int, ...]) -> Parameters:
    """Float64 parameters, with biases other than zero so that none can hide."""
    parameters = Parameters(model.shapes(input_shape)[1], np.float64)
    parameters.initialize(0)
    parameters.vector += 0.01 * np.random.default_rng(0).standard_normal(parameters.size)
    return parameters


def images(N: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((N, *shape))


def assert_gradients_are_the_slopes(model: Layer, N: int, *input_shape: int) -> None:
    """<v, gradient> against the central difference along one random v, for each parameter tensor and for x."""
    rng = np.random.default_rng(2)
    parameters, x = built(model, input_shape), images(N, *input_shape)
    y, backward = model.forward(x, parameters.values, training(N))
    assert y.shape == (N, *model.shapes(input_shape)[0])
    u = rng.standard_normal(y.shape)
    dx = backward(u, parameters.grads, True)

    def output() -> float:
        return float(np.vdot(u, model.forward(x, parameters.values, training(N))[0]))

    values, grads = parameters.named(parameters.vector), parameters.named(parameters.gradient)
    trained = [name for name in values if parameters.specs[name].trained]
    for name, value, gradient in [*((name, values[name], grads[name]) for name in trained), ("x", x, dx)]:
        v, saved = rng.standard_normal(value.shape), value.copy()
        value[...] = saved + STEP * v
        above = output()
        value[...] = saved - STEP * v
        below = output()
        value[...] = saved
        slope = (above - below) / (2 * STEP)
        assert slope != 0, name
        # Along a normal v, a slope is about as large as the norm of the gradient.
        assert float(np.vdot(v, gradient)) == pytest.approx(slope, rel=0, abs=1e-6 * np.linalg.norm(gradient)), name


def without_dropout(model: Any) -> Layer:
    return Chain(*(layer for _, layer in model.layers if not isinstance(layer, Dropout)))


NOT_A_CHAIN = Chain(
    Conv(4, pad=1),
    Residual(Chain(Conv(4, pad=1, relu=True), Dropout(0.3), Conv(4, pad=1)), relu=False),
    ReLU(),
    Branches(Conv(2, size=5, pad=2), MaxPool(3, stride=1, pad=1), Conv(3, size=1)),
    MaxPool(),
    Affine(3),
)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        pytest.param(deepconvnet(10), (28, 28, 1), id="DeepConvNet"),
        pytest.param(without_dropout(deepconvnet(10)), (28, 28, 1), id="DeepConvNet, no dropout"),
        pytest.param(simpleconvnet(10), (28, 28, 1), id="SimpleConvNet"),
        pytest.param(Chain(Conv(3, size=3, stride=2, pad=2), ReLU(), MaxPool(3, 2, pad=1)), (8, 7, 2), id="strides"),
        pytest.param(Chain(Chain(Affine(5), ReLU()), Chain(Affine(4), Dropout())), (6,), id="chains in a chain"),
        pytest.param(NOT_A_CHAIN, (8, 6, 2), id="branches and a skip"),
        pytest.param(Chain(BatchNorm(relu=True), Conv(3), AveragePool(3, 2, pad=1)), (8, 7, 2), id="batch norm"),
        pytest.param(Chain(Affine(4, relu=True), BatchNorm(), Affine(3)), (6,), id="batch norm of no images"),
        pytest.param(Chain(ConvNorm(16, 5, 2), ConvNorm(4), GlobalAveragePool()), (9, 6, 3), id="convolution and norm"),
        pytest.param(
            Chain(
                Standardize(),
                Residual(Chain(ConvNorm(4, stride=2), ConvNorm(4, relu=False)), ConvNorm(4, 1, 2, relu=False)),
                Residual(ConvNorm(4, relu=False)),
                Branches(ConvNorm(3, 1), Chain(MaxPool(3, 1, pad=1), Conv(2, pad="same"))),
            ),
            (7, 6, 3),
            id="projection and branches",
        ),
    ],
)
def test_gradients_are_the_slopes(model, shape):
    assert_gradients_are_the_slopes(model, 2, *shape)


def test_gradients_are_the_same_when_nobody_wants_dx():
    parameters, x = built(NOT_A_CHAIN, (8, 6, 2)), images(3, 8, 6, 2)
    found = []
    for wants_dx in (True, False):
        y, backward = NOT_A_CHAIN.forward(x, parameters.values, training(3))
        parameters.gradient[...] = 0
        backward(np.ones(y.shape), parameters.grads, wants_dx)
        found.append(parameters.gradient.copy())
    np.testing.assert_array_equal(*found)


def test_running_statistics_go_a_tenth_of_the_way_to_those_of_the_parts_of_a_batch():
    """Each part counts by its samples, whoever has it: 2 and 3 of 5, of 4 pixels each."""
    x, norm = images(5, 2, 2, 3), BatchNorm()
    parameters = built(norm, (2, 2, 3))
    parts, wanted = np.split(x, [2]), {"mean": 0.0, "variance": 0.0}
    for part in parts:
        context = Context(training=True, global_batch=5)
        norm.forward(part, parameters.values, context)[1](np.zeros_like(part), parameters.grads, True)
        pixels, share = part.reshape(-1, 3), 0.1 * len(part) / 5
        wanted["mean"] += share * (pixels.mean(axis=0) - parameters.values["mean"])
        wanted["variance"] += share * (pixels.var(axis=0, ddof=1) - parameters.values["variance"])
    for name, way in wanted.items():
        np.testing.assert_allclose(parameters.grads[name], way, rtol=1e-12)


@pytest.mark.parametrize("C", [3, 16])
@pytest.mark.parametrize("model", [BatchNorm(), ConvNorm(16)])
@pytest.mark.filterwarnings("error")
def test_no_samples_leave_running_statistics_where_they_are(model, C):
    parameters, x = built(model, (4, 4, C)), np.zeros((0, 4, 4, C), np.float32)
    y, backward = model.forward(x, parameters.values, Context(training=True, global_batch=3))
    assert backward(np.zeros_like(y), parameters.grads, True).shape == x.shape
    assert not parameters.gradient.any()


def test_nobody_computes_a_gradient_for_what_is_not_trained():
    asked = []

    @dataclass(frozen=True)
    class First(Affine):
        def forward(self, x, params, context):
            y, backward = super().forward(x, params, context)
            return y, lambda dy, grads, wants_dx: asked.append(wants_dx) or backward(dy, grads, wants_dx)

    model, x = Chain(Standardize(), First(3), Affine(2)), images(2, 4)
    parameters = built(model, (4,))
    for wants_dx in (False, True):
        y, backward = model.forward(x, parameters.values, training(2))
        dx = backward(np.ones(y.shape), parameters.grads, wants_dx)
        assert (dx is not None and dx.shape == x.shape) or not wants_dx
    assert asked == [False, True]


@pytest.mark.parametrize("cuts", [[1], [2, 3], [0, 1, 2, 3, 4]])
def test_gradients_of_the_parts_of_a_batch_add_up_to_that_of_the_whole(cuts):
    model = deepconvnet(10)
    parameters, x = built(model, (12, 12, 1)), images(len(SAMPLES), 12, 12, 1)
    dy = np.random.default_rng(3).standard_normal((len(SAMPLES), 10))

    def add_gradient(part: np.ndarray) -> None:
        context = Context(training=True, seed=1, step=5, samples=SAMPLES[part])
        model.forward(x[part], parameters.values, context)[1](dy[part], parameters.grads, False)

    for part in np.split(np.arange(len(SAMPLES)), cuts):
        if len(part):
            add_gradient(part)
    sum_of_parts = parameters.gradient.copy()
    parameters.gradient[...] = 0
    add_gradient(np.arange(len(SAMPLES)))
    whole = parameters.gradient
    assert np.linalg.norm(sum_of_parts - whole) < 1e-13 * np.linalg.norm(whole)


@dataclass(frozen=True)
class Siamese:
    """Two halves of an image, each through the same layers: the product of what they give."""

    body: Layer

    def shapes(self, input_shape):
        H, W, C = input_shape
        return self.body.shapes((H, W // 2, C))

    def forward(self, x, params, context):
        half = x.shape[2] // 2
        left, left_backward = self.body.forward(x[:, :, :half], params, context)
        right, right_backward = self.body.forward(x[:, :, half:], params, context)

        def backward(dy, grads, wants_dx):
            parts = left_backward(dy * right, grads, wants_dx), right_backward(dy * left, grads, wants_dx)
            return np.concatenate(parts, axis=2) if wants_dx else None

        return left * right, backward


def test_a_weight_that_is_used_twice_gets_its_whole_gradient():
    assert_gradients_are_the_slopes(Siamese(Chain(Conv(3, relu=True), MaxPool(), Affine(4))), 3, 6, 12, 1)


def mask(ratio: float, context: Context, size: int = 1000) -> np.ndarray:
    """What dropout makes of ones, in training."""
    y, backward = Dropout(ratio).forward(np.ones((len(context.samples), size)), {}, context)
    np.testing.assert_array_equal(backward(np.ones(y.shape), {}, True), y)
    return y


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_dropout_keeps_its_share_in_training_and_scales_in_evaluation(ratio):
    kept = mask(ratio, training())
    assert set(np.unique(kept)) <= {0.0, 1.0}
    five_deviations = 5 * np.sqrt(ratio * (1 - ratio) / kept.size)
    assert kept.mean() == pytest.approx(1 - ratio, abs=five_deviations)

    x = images(2, 3, 4, 5)
    np.testing.assert_allclose(Dropout(ratio).forward(x, {}, Context(training=False))[0], x * (1 - ratio), rtol=1e-15)


@pytest.mark.parametrize("ratio", [np.float64(0.25), Fraction(1, 4)])
def test_dropout_keeps_the_type_of_its_input_whatever_its_ratio_is(ratio):
    x = images(2, 3, 4, 5).astype(np.float32)
    for is_training in (True, False):
        context = Context(training=is_training, samples=SAMPLES[:2])
        assert Dropout(ratio).forward(x, {}, context)[0].dtype == np.float32


def test_dropout_masks_belong_to_the_sample_whoever_holds_it():
    whole = mask(0.5, training())
    for part in ([0, 1], [2, 3, 4], [4, 0, 3]):
        np.testing.assert_array_equal(mask(0.5, Context(True, seed=1, step=5, samples=SAMPLES[part])), whole[part])


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 6}, {"path": ".dropout2"}, {"samples": SAMPLES + 1}])
def test_dropout_masks_differ_between_seeds_steps_layers_and_samples(change):
    mine = {"seed": 1, "step": 5, "path": ".dropout1", "samples": SAMPLES}
    one, other = mask(0.5, Context(True, **mine)), mask(0.5, Context(True, **{**mine, **change}))
    assert np.mean(one == other) == pytest.approx(0.5, abs=0.05)  # as of two coins


def test_two_dropouts_of_a_chain_draw_different_masks():
    x = np.ones((5, 1000))
    y, _ = Chain(Dropout(0.5), Dropout(0.5)).forward(x, {}, training())
    assert y.mean() == pytest.approx(0.25, abs=0.05)  # 0.5 if they were the same


def test_a_backward_pass_after_an_evaluation_is_refused():
    _, backward = Chain(Affine(2)).forward(
        np.ones((3, 4)), {"affine1": {"W": np.ones((4, 2)), "b": np.ones(2)}}, Context(training=False)
    )
    with pytest.raises(RuntimeError, match="training=True"):
        backward(np.ones((3, 2)), {}, True)


def test_dropout_without_sample_indices_says_what_is_missing():
    with pytest.raises(ValueError, match="samples"):
        Chain(Dropout()).forward(np.ones((2, 3)), {}, Context(training=True))


@dataclass(frozen=True)
class Watch:
    """A layer that knows whether anybody still holds what it gave out."""

    outputs: list = field(default_factory=list)

    def shapes(self, input_shape):
        return input_shape, {}

    def forward(self, x, params, context):
        y = x + 1
        self.outputs.append(weakref.ref(y))
        return y, lambda dy, grads, wants_dx: dy


def test_evaluation_keeps_no_activations_and_training_keeps_them_as_long_as_backward():
    watch = Watch()
    model = Chain(Conv(2), watch, Conv(2, relu=True), Chain(watch, Affine(3)))
    parameters, x = built(model, (6, 6, 1)), images(2, 6, 6, 1)
    kept = model.forward(x, parameters.values, Context(training=False))
    assert [output() for output in watch.outputs] == [None, None]

    watch.outputs.clear()
    kept = model.forward(x, parameters.values, training(2))
    assert all(output() is not None for output in watch.outputs)
    del kept
    assert [output() for output in watch.outputs] == [None, None]


class InPlaceReLU(ReLU):
    """A user's layer whose backward pass writes to its dy, as the textbook's does."""

    def forward(self, x, params, context):
        y = np.maximum(x, 0)

        def backward(dy, grads, wants_dx):
            dy[y <= 0] = 0
            return dy

        return y, backward


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shortcut", [None, InPlaceReLU(), Conv(2, 1)])
def test_a_body_that_writes_to_its_dy_leaves_the_gradient_beside_it_alone(relu, shortcut):
    inner = Residual(Chain(Conv(2, pad=1), InPlaceReLU()), shortcut, relu)
    assert_gradients_are_the_slopes(Chain(Residual(inner, None, relu), Affine(2)), 3, 4, 4, 2)


def test_a_pass_changes_neither_its_input_nor_the_parameters_nor_dy():
    model = deepconvnet(10)
    parameters, x = built(model, (12, 12, 1)), images(2, 12, 12, 1)
    dy = np.ones((2, 10))
    for array in (x, dy, parameters.vector, *parameters.named(parameters.vector).values()):
        array.flags.writeable = False
    _, backward = Chain(ReLU(), model).forward(x, {"chain1": parameters.values}, training(2))
    backward(dy, {"chain1": parameters.grads}, True)
    assert np.isfinite(parameters.gradient).all()


@dataclass(frozen=True)
class Own(Conv):
    """A user's convolution, which computes something else."""


def test_a_convolution_and_its_pool_as_one_layer_are_the_two_and_a_users_own_stays_as_it_is():
    model = Chain(Conv(2, 5, pad=2, relu=True), MaxPool(), Own(3, pad=1), MaxPool(), Conv(3), MaxPool(3, 1), Affine(4))
    names = [name for name, _ in fused(model).layers]
    assert names == ["conv1", "own1", "maxpool2", "conv2", "maxpool3", "affine1"]
    x, results = images(5, 20, 21, 1), []
    for one in (model, fused(model)):
        parameters = built(one, x.shape[1:])
        y, backward = one.forward(x, parameters.values, training())
        results.append((y, backward(np.ones_like(y), parameters.grads, True), parameters.gradient))
    for apart, together in zip(*results, strict=True):
        np.testing.assert_array_equal(together, apart)


@dataclass(frozen=True, init=False)
class Doubled(Chain):
    """A user's chain, which computes something else."""

    def forward(self, x, params, context):
        y, backward = super().forward(x, params, context)
        return 2 * y, lambda dy, grads, wants_dx: backward(2 * dy, grads, wants_dx)


def test_a_chain_of_a_users_own_computes_what_it_computes_where_layers_are_joined_or_looked_over():
    parts, x = (Conv(2, 5), MaxPool(), Affine(4)), images(2, 12, 12, 1)
    parameters = built(Chain(*parts), x.shape[1:])
    wanted = 2 * Chain(*parts).forward(x, parameters.values, training(2))[0]
    for change in (fused, checked, lambda model: traced(model, Spans())):
        y, _ = change(Doubled(*parts)).forward(x, parameters.values, training(2))
        np.testing.assert_array_equal(y, wanted)


def test_blocks_are_made_of_layers_and_nothing_else():
    for wrong in (lambda: Residual(3), lambda: Residual(Conv(4), Conv), lambda: Branches(Conv(4), "pool"), Branches):
        with pytest.raises(UsageError, match="layers"):
            wrong()


def test_layers_are_named_after_kind_and_number():
    model = Chain(Conv(1), ReLU(), Conv(2), Affine(3), MaxPool(), Affine(4))
    assert [name for name, _ in model.layers] == ["conv1", "relu1", "conv2", "affine1", "maxpool1", "affine2"]


def test_two_layers_of_a_chain_never_share_a_name():
    Affine1 = type("Affine1", (Affine,), {})
    assert [name for name, _ in Chain(Affine1(4), *[Affine(4)] * 10).layers][:2] == ["affine11", "affine1"]
    with pytest.raises(UsageError, match="two layers of this chain would be named affine11"):
        Chain(Affine1(4), *[Affine(4)] * 11)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Conv(4, size=5), (4, 9, 1), r"Conv\(filters=4, size=5.* does not fit into an image of 4 x 9"),
        (Chain(Conv(4, size=3), MaxPool(size=3)), (9, 4, 1), r"MaxPool\(size=3.* image of 7 x 2"),
        (Chain(Affine(7), Conv(4)), (8, 8, 1), r"Conv\(filters=4.* needs images .* \(7,\)"),
        (Chain(Affine(7), MaxPool()), (8, 8, 1), r"MaxPool\(.* needs images .* \(7,\)"),
        (MaxPool(pad=2), (4, 4, 1), r"MaxPool\(.*pad=2.* in the padding alone"),
        (Conv(4, stride=0), (8, 8, 1), r"Conv\(.*stride=0.* at least 1"),
        (Conv(4, size=0), (8, 8, 1), r"Conv\(.*size=0.* at least 1"),
        (Dropout(1.5), (8,), r"Dropout\(ratio=1.5.* 0 to 1"),
        (Conv(4, size=4, pad="same"), (8, 8, 1), r"Conv\(.*size=4.* odd size"),
        (Conv(4, size="3", pad="same"), (8, 8, 1), r"Conv\(.*size='3'.*size must be a whole number"),
        (ConvNorm(4, size=None), (8, 8, 1), r"Conv.*size=None.*size must be a whole number"),
        (Conv(4, pad="valid"), (8, 8, 1), r"Conv\(.*pad='valid'.* whole number"),
        (AveragePool(9), (8, 8, 1), r"AveragePool\(size=9.* image of 8 x 8"),
        (GlobalAveragePool(), (8,), r"GlobalAveragePool\(\) needs images .* \(8,\)"),
        (BatchNorm(), (), r"BatchNorm\(.* needs channels"),
        (BatchNorm(32), (8, 8, 32), r"BatchNorm\(.* relu is 32, but True or False was expected"),  # not its channels
        (BatchNorm(epsilon=0), (8, 8, 4), r"BatchNorm\(.* epsilon must be a number above 0"),
        (BatchNorm(epsilon=-1e-5), (8, 8, 4), r"BatchNorm\(.* epsilon must be a number above 0"),
        (BatchNorm(epsilon="x"), (8, 8, 4), r"BatchNorm\(.* epsilon must be a number above 0"),
        (BatchNorm(momentum=9), (8, 8, 4), r"BatchNorm\(.* momentum must lie in 0 to 1"),
        (Conv(8, 3, 1, 1, 32), (8, 8, 4), r"Conv\(.* relu is 32"),
        (ConvNorm(8, 3, 1, 1, 0.1), (8, 8, 4), r"relu is 0.1"),
        (ConvNorm(8, momentum=9), (8, 8, 4), r"momentum must lie in 0 to 1"),
        (Affine(784, 10), (8, 8, 4), r"Affine\(.* relu is 10"),  # not inputs and outputs
        (Residual(Conv(4, 1), Conv(4, 1), Conv(4, 1)), (8, 8, 4), r"Residual\(.* relu is Conv\(.* True or False"),
        (Residual(Conv(4)), (8, 8, 4), r"body makes \(6, 6, 4\) of \(8, 8, 4\), .* give it a shortcut"),
        (Branches(Conv(4), Conv(4, pad="same")), (8, 8, 1), r"\(6, 6, 4\), \(8, 8, 4\) of .* one height"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_layer_named(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model.shapes(shape)
