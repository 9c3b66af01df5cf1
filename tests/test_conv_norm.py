"""A convolution and the batch norm behind it in one, beside the two of them in float64; fused blocks beside blocks."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from distconv.kernels.composed import Composed
from distconv.kernels.cpu.device import Cpu
from distconv.kernels.cpu.elementwise import BLOCK
from distconv.nn.blocks import Residual
from distconv.nn.fusion import ResidualNorm, fused
from distconv.nn.layers import Affine, Backward, Chain, Context, Conv, Layer, inner_layers
from distconv.nn.normalization import BatchNorm, ConvNorm
from distconv.nn.parameters import Parameters, Shape, Specs, Views

TOLERANCE = 2e-5  # of each tensor's norm
EPSILON = 1e-3

# H, W, C, F, K, stride, pad: rounds of several images, of parts of images, and of images that fill no tile; then what
# has no kernel of its own.
SHAPES = [
    (32, 32, 16, 16, 3, 1, 1),
    (16, 16, 32, 32, 3, 1, 1),
    (8, 8, 64, 96, 3, 1, 1),
    (70, 66, 16, 48, 3, 1, 1),
    (13, 11, 32, 16, 3, 1, 0),
    (3, 4, 16, 16, 3, 1, 2),
    (9, 8, 3, 16, 3, 1, 1),
    (9, 8, 16, 32, 3, 2, 1),
    (6, 5, 32, 16, 1, 2, 0),
    (5, 6, 5, 7, 3, 1, 1),
]


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> bool:
    assert found.shape == expected.shape
    return bool(np.linalg.norm(found - expected) <= tolerance * max(1e-6, np.linalg.norm(expected)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("N", [1, 18])
@pytest.mark.parametrize(("relu", "adds"), [(True, False), (False, False), (True, True), (False, True)])
def test_it_is_the_convolution_and_the_norm_in_float64(shape: tuple[int, ...], N: int, relu: bool, adds: bool) -> None:
    H, W, C, F, K, stride, pad = shape
    N = min(N, 4) if H > 32 else N
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, H, W, C)).astype(np.float32)
    w, gamma, beta = (rng.standard_normal(size).astype(np.float32) for size in ((K, K, C, F), (F,), (F,)))
    linear = Cpu(np.float64).conv_norm(
        *(array.astype(np.float64) for array in (x, w, gamma, beta)), EPSILON, stride, pad, False
    )[0]
    beside = rng.standard_normal(linear.shape).astype(np.float32) if adds else None
    onto = rng.standard_normal(x.shape).astype(np.float32) if adds else None
    # Rounding may bring what is near 0 to the other side of ReLU's bend, so it gets no gradient.
    dy = rng.standard_normal(linear.shape).astype(np.float32)
    dy[np.abs(linear + (0 if beside is None else beside)) < 1e-3] = 0
    for array in (x, dy) if beside is None or onto is None else (x, dy, beside, onto):
        array.flags.writeable = False

    def run(dtype: type) -> list[np.ndarray]:
        given = [array.astype(dtype, copy=False) for array in (x, w, gamma, beta)]
        extra = [None if array is None else array.astype(dtype, copy=False) for array in (beside, onto)]
        y, mean, variance, backward = Cpu(dtype).conv_norm(*given, EPSILON, stride, pad, relu, extra[0])
        sums = [np.full(array.shape, 0.5, dtype) for array in given[1:]]  # what is there stays in the sum
        dx, dbeside = backward(dy.astype(dtype, copy=False), *sums, True, extra[1])
        nothing, _ = backward(dy.astype(dtype, copy=False), *(np.zeros_like(array) for array in sums), False, None)
        assert nothing is None
        return [y, mean, variance, dx, *sums] + ([dbeside] if adds else [])

    names = "y", "mean", "variance", "dx", "dw", "dgamma", "dbeta", "dbeside"
    few = linear.size // F < 100  # of few numbers, a small variance makes rounding large
    for name, found, expected in zip(names, run(np.float32), run(np.float64), strict=False):
        assert found.dtype == np.float32
        assert close(found, expected, 10 * TOLERANCE if few else TOLERANCE), name


def test_statistics_are_those_of_the_convolution_to_the_last_bits_that_float32_has() -> None:
    rng = np.random.default_rng(0)
    x = (3 + rng.standard_normal((20, 32, 32, 16))).astype(np.float32)
    w = rng.standard_normal((3, 3, 16, 32)).astype(np.float32)
    kernels, zeros = Cpu(), np.zeros(32, np.float32)
    c = kernels.conv_forward(x, w, None, 1, 1, False).astype(np.float64)
    _, mean, variance, _ = kernels.conv_norm(x, w, zeros, zeros, EPSILON, 1, 1, False)
    np.testing.assert_allclose(mean, c.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(variance, c.var(axis=(0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize("far", [1e3, -1e6])
@pytest.mark.parametrize(
    "where", ["the first pixel", "the first pixel alone", "first pixels", "the first image", "half"]
)
def test_pixels_far_from_all_others_do_not_spoil_the_variance(far: float, where: str) -> None:
    x = np.random.default_rng(0).standard_normal((20, 16, 16, 16)).astype(np.float32)
    if where == "the first pixel alone":
        x[...] = 0
    {"first pixels": x[:, 0, 0], "the first image": x[0], "half": x[10:]}.get(where, x[0, 0, 0])[...] += far
    _, mean, variance = Cpu().norm_forward(x, np.ones(16, np.float32), np.zeros(16, np.float32), EPSILON, False)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=(0, 1, 2)), rtol=1e-6, atol=1e-6 * exact.std())
    np.testing.assert_allclose(variance, exact.var(axis=(0, 1, 2)), rtol=3e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])  # by a kernel, and composed
def test_an_output_that_no_gradient_needs_is_not_kept(dtype: type) -> None:
    """A pooling layer behind it keeps nothing of it, either."""
    layer, x = ConvNorm(16), np.ones((2, 8, 8, 16), dtype)
    parameters = Parameters(layer.shapes(x.shape[1:])[1], dtype)
    y, backward = layer.forward(x, parameters.values, Context(training=True, kernels=Cpu(dtype), global_batch=2))
    shape, still_there = y.shape, weakref.ref(y)
    del y
    assert still_there() is None
    backward(np.ones(shape, dtype), parameters.grads, False)


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1])
def test_running_statistics_go_momentum_of_the_way_to_those_of_the_convolution(momentum: float) -> None:
    layer, x = ConvNorm(16, momentum=momentum), np.random.default_rng(0).standard_normal((3, 8, 8, 2))
    parameters = Parameters(layer.shapes(x.shape[1:])[1], np.float64)
    w = np.random.default_rng(1).standard_normal((3, 3, 2, 16))
    parameters.values["W"][...], parameters.values["variance"][...] = w, 1
    y, backward = layer.forward(x, parameters.values, Context(training=True, kernels=Cpu(np.float64), global_batch=3))
    backward(np.ones_like(y), parameters.grads, False)
    pixels = Cpu(np.float64).conv_forward(x, w, None, 1, 1, False).reshape(-1, 16)
    np.testing.assert_allclose(parameters.grads["mean"], momentum * pixels.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(parameters.grads["variance"], momentum * (pixels.var(axis=0, ddof=1) - 1), rtol=1e-12)


def block(filters: int, **options: object) -> Residual:
    return Residual(Chain(ConvNorm(filters), ConvNorm(filters, relu=False)), **options)  # type: ignore[arg-type]


MODEL = Chain(
    ConvNorm(16),
    block(16),
    Residual(Chain(ConvNorm(32, stride=2), ConvNorm(32, relu=False)), ConvNorm(32, 1, 2, relu=False)),
    Residual(Chain(ConvNorm(16, 1), ConvNorm(16), ConvNorm(32, 1, relu=False))),  # a bottleneck
    block(32, relu=False),
    Residual(Chain(ConvNorm(32), Conv(32, pad=1))),
)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 1e-4)])
@pytest.mark.parametrize("wants_dx", [True, False])
def test_a_fused_model_is_the_model(dtype: type, tolerance: float, wants_dx: bool) -> None:
    _, specs = MODEL.shapes((12, 10, 16))
    found = []
    for model in (MODEL, fused(MODEL)):
        parameters = Parameters(specs, dtype)
        parameters.initialize(0)
        x = np.random.default_rng(1).standard_normal((6, 12, 10, 16)).astype(dtype)
        y, backward = model.forward(x, parameters.values, Context(training=True, kernels=Cpu(dtype), global_batch=6))
        dx = backward(np.random.default_rng(2).standard_normal(y.shape).astype(dtype), parameters.grads, wants_dx)
        scores, _ = model.forward(x, parameters.values, Context(training=False, kernels=Cpu(dtype)))
        found.append([y, scores, *parameters.named(parameters.gradient).values(), *([dx] if wants_dx else [])])
        assert wants_dx or dx is None
    assert all(gradient.any() for gradient in found[0])
    for one, other in zip(*found, strict=True):
        assert close(other, one, tolerance)


class InPlace:
    """A user's layer that writes to what it is given."""

    def shapes(self, shape: Shape) -> tuple[Shape, Specs]:
        return shape, {}

    def forward(self, x: np.ndarray, params: Views, context: Context) -> tuple[np.ndarray, Backward]:
        x *= 2
        return x, lambda dy, grads, wants_dx: 2 * dy


def test_a_shortcut_is_called_behind_the_body_as_in_evaluation() -> None:
    residual, found = block(16, shortcut=InPlace()), []
    ((_, fused_block),) = inner_layers(fused(Chain(residual)))
    for layer in (residual, fused_block):
        parameters = Parameters(layer.shapes((8, 8, 16))[1])
        parameters.initialize(0)
        x = np.random.default_rng(1).standard_normal((4, 8, 8, 16)).astype(np.float32)
        found.append(layer.forward(x, parameters.values, Context(training=True))[0])
    assert close(*found)


class MyConvNorm(ConvNorm):
    """A user's own kind may compute something else."""


@pytest.mark.parametrize(
    ("layer", "is_fused"),
    [
        (block(8), True),
        (Residual(ConvNorm(8, relu=False)), False),  # no chain
        (Residual(Chain(ConvNorm(8, relu=False))), False),  # of one, the gradient beside it would be added too soon
        (Residual(Chain(ConvNorm(8), ConvNorm(8))), False),  # ReLU, then the sum
        (Residual(Chain(Conv(8, pad=1), ConvNorm(8, relu=False))), False),
        (Residual(Chain(ConvNorm(8), MyConvNorm(8, relu=False))), False),
        (Residual(Chain(Conv(8, pad=1), BatchNorm())), False),
    ],
    ids=str,
)
def test_only_what_computes_the_same_is_fused(layer: Layer, is_fused: bool) -> None:
    ((name, found),) = inner_layers(fused(Chain(layer)))
    assert name == "residual1"
    assert isinstance(found, ResidualNorm) == is_fused and getattr(found, "block", found) == layer


class Double:
    """A user's layer that takes no care of types."""

    def shapes(self, shape: Shape) -> tuple[Shape, Specs]:
        return shape, {}

    def forward(self, x: np.ndarray, params: Views, context: Context) -> tuple[np.ndarray, Backward]:
        return x.astype(np.float64), lambda dy, grads, wants_dx: dy.astype(np.float64)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(
    "before",
    [
        Residual(Chain(ConvNorm(16), ConvNorm(16, relu=False)), Double()),
        Residual(Chain(ConvNorm(16), ConvNorm(16, relu=False))),
        ConvNorm(16),
        BatchNorm(),
        Conv(16, pad=1),
        Conv(16, 5, pad=2, relu=True),
        Affine(16),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_doubles_of_a_users_layer_are_numbers_like_others(before: Layer, in_order: bool) -> None:
    model, found = fused(Chain(before, Double())), []
    _, specs = model.shapes((8, 8, 16))
    for dtype in (np.float32, np.float64):
        parameters = Parameters(specs, dtype)
        parameters.initialize(0)
        x = np.random.default_rng(1).standard_normal((4, 8, 8, 16)).astype(dtype)
        kernels = Cpu(dtype, in_order and dtype == np.float32)
        y, backward = model.forward(x, parameters.values, Context(training=True, kernels=kernels, global_batch=4))
        dx = backward(np.random.default_rng(2).standard_normal(y.shape).astype(dtype), parameters.grads, True)
        found.append([y, dx, parameters.gradient])
    for one, other in zip(*found, strict=True):
        assert close(one, other, 1e-4)


@pytest.mark.parametrize("size", [0, 5, BLOCK, 2 * BLOCK + 3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_total_is_the_sum_in_order(size: int, count: int) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((size, 2)).astype(np.float32)[:, ::-1] for _ in range(count)]
    expected = parts[0].copy()
    for part in parts[1:]:
        expected += part
    for found in (Cpu().total(parts), Composed.total(Cpu(), parts)):
        np.testing.assert_array_equal(found, expected)
