"""The kernels of the CPU against loops in float64, at the shapes where indices go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distconv.kernels.cpu import arithmetic as cpu
from distconv.kernels.cpu import elementwise
from distconv.kernels.cpu import normalization as norm
from tests import reference

steady = settings(derandomize=True, deadline=None, max_examples=100)
TOLERANCE = {np.float64: 1e-12, np.float32: 1e-5}  # of the norm
either_precision = pytest.mark.parametrize("dtype", TOLERANCE)


class Case(NamedTuple):
    """A convolution, or, without F, a pooling."""

    N: int
    H: int
    W: int
    C: int
    F: int
    K: int
    stride: int
    pad: int

    @property
    def x_shape(self) -> tuple[int, ...]:
        return self.N, self.H, self.W, self.C

    @property
    def w_shape(self) -> tuple[int, ...]:
        return self.K, self.K, self.C, self.F

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(cpu.output_size(size, self.K, self.stride, self.pad) for size in (self.H, self.W))


@st.composite
def cases(draw: st.DrawFn, extra_pad: int) -> Case:
    """Shapes in which at least one window fits; pads up to K - 1 + extra_pad."""
    K = draw(st.integers(1, 5))
    pad = draw(st.integers(0, K - 1 + extra_pad))
    H, W = (draw(st.integers(max(1, K - 2 * pad), 8)) for _ in range(2))
    N, C, F, stride = (draw(st.integers(1, 3)) for _ in range(4))
    return Case(N, H, W, C, F, K, stride, pad)


convolutions, poolings = cases(extra_pad=2), cases(extra_pad=0)
WIDE_PAD = Case(N=2, H=3, W=5, C=3, F=1, K=2, stride=3, pad=4)  # windows that see nothing but padding
ROWS_LEFT = Case(N=1, H=7, W=8, C=1, F=3, K=2, stride=3, pad=0)  # the last column fills no window


def normal(dtype: type, *shapes: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Arrays of random numbers that cannot be written to, so that a kernel which changes its input fails."""
    rng = np.random.default_rng(0)
    for shape in shapes:
        yield read_only(rng.standard_normal(shape).astype(dtype))


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def assert_close(found: np.ndarray, expected: np.ndarray, dtype: type) -> None:
    assert found.dtype == dtype
    assert found.shape == expected.shape
    error, norm = np.linalg.norm(found - expected), np.linalg.norm(expected)
    assert error <= TOLERANCE[dtype] * norm, f"off by {error / norm:.1e} of the norm"


def filter_gradients(x: np.ndarray, dy: np.ndarray, case: Case) -> tuple[np.ndarray, np.ndarray]:
    dw, db = np.zeros(case.w_shape, x.dtype), np.zeros(case.F, x.dtype)
    for _ in range(2):  # a weight may be used twice, so they are added to what is there
        cpu.conv_backward_filters(x, dy, case.stride, case.pad, dw, db)
    return dw / 2, db / 2


def assert_convolution_is_the_loops(case: Case, dtype: type) -> None:
    y_shape = (case.N, *case.grid, case.F)
    x, w, b, dy = normal(dtype, case.x_shape, case.w_shape, (case.F,), y_shape)
    expected = reference.conv_forward(x, w, b, case.stride, case.pad)
    assert_close(cpu.conv_forward(x, w, b, case.stride, case.pad, relu=False), expected, dtype)
    assert_close(cpu.conv_forward(x, w, b, case.stride, case.pad, relu=True), np.maximum(expected, 0), dtype)

    dx, dw, db = reference.conv_backward(x, w, dy, case.stride, case.pad)
    found_dw, found_db = filter_gradients(x, dy, case)
    assert_close(found_dw, dw, dtype)
    assert_close(found_db, db, dtype)
    assert_close(cpu.conv_backward_input(dy, w, case.stride, case.pad, x.shape), dx, dtype)


@steady
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(0, 6))
def test_output_size_counts_the_windows_that_fit(size, window, stride, pad):
    if size + 2 * pad >= window:
        starts = [start for start in range(-pad, size + pad, stride) if start + window <= size + pad]
        assert cpu.output_size(size, window, stride, pad) == len(starts)


@either_precision
@steady
@given(convolutions)
@example(WIDE_PAD)
@example(ROWS_LEFT)
def test_convolution_and_its_three_gradients_are_the_loops(dtype, case):
    assert_convolution_is_the_loops(case, dtype)


@either_precision
@pytest.mark.parametrize("images", [0, 2, 4])  # none: a single image is still too large, and goes alone
def test_convolution_is_the_same_when_the_patches_of_few_images_fit(monkeypatch, dtype, images):
    case = Case(N=5, H=6, W=4, C=3, F=3, K=3, stride=1, pad=1)
    patch_bytes = int(np.prod([*case.grid, *case.w_shape[:3]])) * np.dtype(dtype).itemsize
    monkeypatch.setattr(cpu, "PATCH_BYTES", images * patch_bytes)
    assert_convolution_is_the_loops(case, dtype)


@pytest.mark.parametrize("C", [1, 5, 16])  # two of these have kernels of their own
def test_a_convolution_without_bias_is_one_whose_bias_is_zero(C: int) -> None:
    x, w, dy = normal(np.float32, (2, 6, 6, C), (3, 3, C, 16), (2, 6, 6, 16))
    (none, dw), (zero, dw_beside) = ((b, np.zeros_like(w)) for b in (None, np.zeros(16, np.float32)))
    y = cpu.conv_forward(x, w, zero, 1, 1, False)
    np.testing.assert_array_equal(cpu.conv_forward(x, w, none, 1, 1, False), y)
    dx, dx_beside = (
        cpu.conv_backward(x, y, dy, w, 1, 1, False, *of, True) for of in ((dw, none), (dw_beside, zero.copy()))
    )
    np.testing.assert_array_equal(dx, dx_beside)
    np.testing.assert_array_equal(dw, dw_beside)


def test_ones_convolved_with_ones_count_the_pixels_under_the_filter():
    y = cpu.conv_forward(np.ones((1, 3, 4, 1)), np.ones((3, 3, 1, 1)), np.zeros(1), stride=1, pad=1, relu=False)
    np.testing.assert_array_equal(y[0, :, :, 0], [[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]])


@pytest.mark.parametrize("dtype", [*TOLERANCE, np.float16])
@pytest.mark.parametrize("high", [0, 3])  # with 3, numbers from -3 to 2; with 0, only below the padding's zeros
@steady
@given(poolings)
@example(Case(N=2, H=3, W=5, C=3, F=1, K=3, stride=2, pad=2))
@example(ROWS_LEFT)
@example(Case(N=1, H=18, W=19, C=1, F=1, K=17, stride=1, pad=0))  # more places in a window than a byte counts
def test_pooling_takes_the_largest_and_its_gradient_goes_to_the_first_of_equals(dtype, high, case):
    # Few different numbers, so that many windows have several largest ones.
    x = read_only(np.random.default_rng(0).integers(-3, high, case.x_shape).astype(dtype))
    y, winner = cpu.max_pool_forward(x, case.K, case.stride, case.pad)
    np.testing.assert_array_equal(y, reference.max_pool_forward(x, case.K, case.stride, case.pad))
    assert y.dtype == dtype

    # Whole numbers add up exactly in any order, so overlapping windows leave no rounding to tolerate.
    dy = read_only(np.random.default_rng(1).integers(1, 9, y.shape).astype(dtype))
    dx = cpu.max_pool_backward(dy, read_only(winner), case.K, case.stride, case.pad, x.shape)
    np.testing.assert_array_equal(dx, reference.max_pool_backward(x, dy, case.K, case.stride, case.pad))
    assert dx.dtype == dtype


@either_precision
@steady
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5))
def test_affine_layer_and_its_gradients_are_the_loops(dtype, N, C, F):
    x, w, b, dy = normal(dtype, (N, C), (C, F), (F,), (N, F))
    expected = reference.affine_forward(x, w, b)
    assert_close(cpu.affine_forward(x, w, b, relu=False), expected, dtype)
    assert_close(cpu.affine_forward(x, w, b, relu=True), np.maximum(expected, 0), dtype)

    for relu, passed in ((False, dy), (True, dy * (expected > 0))):
        dw, db = np.zeros((C, F), dtype), np.zeros(F, dtype)
        y = cpu.affine_forward(x, w, b, relu)
        cpu.affine_backward(x, y, dy, w, relu, dw, db)
        found = cpu.affine_backward(x, y, dy, w, relu, dw, db), dw / 2, db / 2
        for array, wanted in zip(found, reference.affine_backward(x, w, passed), strict=True):
            assert_close(array, wanted, dtype)


def test_relu_lets_the_gradient_through_where_the_output_is_positive_only():
    y, dy = read_only(np.array([0.0, 2.0, 0.0, 1e-300])), read_only(np.array([3.0, 4.0, -5.0, -6.0]))
    np.testing.assert_array_equal(elementwise.relu_backward(dy, y), [0, 4, 0, -6])


@either_precision
@steady
@given(st.integers(0, 5), st.integers(1, 6))
def test_softmax_cross_entropy_is_the_loops_even_for_no_sample(dtype, N, F):
    [scores] = normal(dtype, (N, F))
    labels = read_only(np.random.default_rng(1).integers(0, F, N).astype(np.uint8))
    loss, dscores = cpu.softmax_cross_entropy(scores, labels)
    expected_loss, expected = reference.softmax_cross_entropy(scores, labels)
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])
    assert dscores.dtype == dtype
    np.testing.assert_allclose(dscores, expected, rtol=0, atol=TOLERANCE[dtype])


@either_precision
@steady
@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.5, 0.9]), st.integers(1, 9))
def test_a_smoothed_label_is_a_mixed_target(dtype, N, F, smoothing, batch):
    [scores] = normal(dtype, (N, F))
    labels = read_only(np.random.default_rng(1).integers(0, F, N).astype(np.uint8))
    loss, dscores = cpu.softmax_cross_entropy(scores, labels, batch, smoothing)
    expected_loss, expected = reference.softmax_cross_entropy(scores, labels, smoothing)
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])
    assert dscores.dtype == dtype
    np.testing.assert_allclose(dscores * dtype(batch), expected, rtol=0, atol=TOLERANCE[dtype])


def test_the_gradient_of_smoothed_labels_is_the_slope_of_their_loss():
    [scores], labels, by = normal(np.float64, (3, 4)), np.array([1, 3, 3]), 1e-5
    _, dscores = cpu.softmax_cross_entropy(scores, labels, 1, 0.3)
    for place in np.ndindex(*scores.shape):
        up, down = scores.copy(), scores.copy()
        up[place] += by
        down[place] -= by
        slope = np.subtract(*(cpu.softmax_cross_entropy(moved, labels, 1, 0.3)[0] for moved in (up, down))) / (2 * by)
        assert dscores[place] == pytest.approx(slope, abs=1e-8)


@either_precision
def test_softmax_of_huge_scores_does_not_overflow(dtype):
    scores = read_only(np.array([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4]], dtype))
    loss, dscores = cpu.softmax_cross_entropy(scores, read_only(np.array([1, 0])))
    assert loss == pytest.approx(2e4 + np.log(2), rel=TOLERANCE[dtype])
    np.testing.assert_allclose(dscores, [[1, -1, 0], [-0.5, 0.5, 0]], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("kernel", "shapes", "options"),
    [
        (cpu.conv_forward, [(3, 6, 5, 3), (3, 3, 3, 4), (4,)], {"stride": 1, "pad": 1}),
        (cpu.affine_forward, [(3, 8), (8, 5), (5,)], {}),
    ],
)
def test_halves_are_multiplied_in_float32_and_rounded_once(kernel, shapes, options, relu):
    halves = list(normal(np.float16, *shapes))
    y = kernel(*halves, **options, relu=relu)
    rounded = kernel(*(array.astype(np.float32) for array in halves), **options, relu=relu).astype(np.float16)
    np.testing.assert_array_equal(y, rounded, strict=True)


def test_sums_of_halves_do_not_stop_at_2048():
    # 2048 + 1 is no half: a sum of ones in halves stays there for ever.
    x, b = np.ones((1, 5, 5, 200), np.float16), np.zeros(1, np.float16)
    assert cpu.conv_forward(x, np.ones((5, 5, 200, 1), np.float16), b, stride=1, pad=0, relu=False) == 5000
    assert cpu.affine_forward(x.reshape(1, 5000), np.ones((5000, 1), np.float16), b, relu=False) == 5000


@either_precision
@given(poolings)
@steady
def test_average_pooling_is_that_of_the_loops(dtype: type, case: Case) -> None:
    x, dy = normal(dtype, case.x_shape, (case.N, *case.grid, case.C))
    window = case.K, case.stride, case.pad
    assert_close(cpu.average_pool_forward(x, *window), reference.average_pool_forward(x, *window), dtype)
    dx = cpu.average_pool_backward(dy, *window, x.shape)
    assert_close(dx, reference.average_pool_backward(x, dy, *window), dtype)


@either_precision
def test_the_mean_of_all_pixels_is_that_of_one_window_as_large_as_the_image(dtype: type) -> None:
    x, dy = normal(dtype, (3, 4, 4, 5), (3, 5))
    assert_close(cpu.pixel_mean(x), reference.average_pool_forward(x, 4, 1, 0)[:, 0, 0], dtype)
    dx = reference.average_pool_backward(x, dy[:, None, None], 4, 1, 0)
    assert_close(cpu.pixel_mean_backward(dy, x.shape), dx, dtype)


# 16 and 48 channels have compiled kernels; with 16, more than 256 pixels are more than one block.
@pytest.mark.parametrize(
    "shape", [(3, 5), (2, 3, 4, 3), (2, 3, 4, 16), (5, 48), (1, 16), (3, 11, 13, 16), (2, 23, 8, 32)]
)
@pytest.mark.parametrize("relu", [False, True])
@either_precision
def test_batch_norm_is_that_of_the_loops(dtype: type, relu: bool, shape: tuple[int, ...]) -> None:
    C = shape[-1]
    x, dy, gamma, beta = normal(dtype, shape, shape, (C,), (C,))
    x = read_only(3 * x + 10)
    y, mean, variance = norm.norm_forward(x, gamma, beta, 1e-3, relu)
    wanted_y, *wanted = reference.norm_forward(x.reshape(-1, C), gamma, beta, 1e-3)
    assert_close(y.reshape(-1, C), np.maximum(wanted_y, 0) if relu else wanted_y, dtype)
    for found, one in zip((mean, variance), wanted, strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, one, rtol=10 * TOLERANCE[dtype], atol=1e-12)

    dgamma, dbeta = np.full(C, 2, dtype), np.full(C, 3, dtype)  # they are added to
    dx = norm.norm_backward(x, dy, gamma, beta, mean, variance, 1e-3, relu, dgamma, dbeta)
    gated = np.where(y > 0, dy, 0) if relu else dy
    wanted_dx, wanted_dgamma, wanted_dbeta = reference.norm_backward(
        x.reshape(-1, C), gamma, gated.reshape(-1, C), 1e-3
    )
    if len(x.reshape(-1, C)) > 1:  # of one pixel, dx is 0 but for rounding
        error = np.linalg.norm(dx.reshape(-1, C) - wanted_dx)
        assert error <= 10 * TOLERANCE[dtype] * np.linalg.norm(wanted_dx)
    assert dx.shape == x.shape and dx.dtype == dtype
    assert_close(dgamma, wanted_dgamma + 2, dtype)
    assert_close(dbeta, wanted_dbeta + 3, dtype)


def test_the_variance_of_numbers_far_from_zero_is_theirs() -> None:
    x = (1e4 + np.random.default_rng(0).standard_normal((4000, 16))).astype(np.float32)
    _, _, variance = norm.norm_forward(x, np.ones(16, np.float32), np.zeros(16, np.float32), 1e-5, False)
    np.testing.assert_allclose(variance, x.astype(np.float64).var(axis=0), rtol=1e-3)  # 1e8 - 1e8 would leave nothing


@pytest.mark.parametrize("C", [3, 48])  # blocks of 48 channels have 85 pixels, whose mean is rounded
@pytest.mark.parametrize("value", [0.1, 1e6 / 3, -1e20])
def test_numbers_that_are_all_the_same_become_beta(C: int, value: float) -> None:
    x, gamma, beta = np.full((300_000, C), value, np.float32), np.ones(C, np.float32), np.full(C, 7, np.float32)
    y, _, variance = norm.norm_forward(x, gamma, beta, 1e-5, False)
    assert not variance.any()
    np.testing.assert_array_equal(y, 7)


def test_statistics_and_gradients_of_a_million_numbers_are_those_of_float64() -> None:
    rng, C = np.random.default_rng(0), 3
    x = (1000 + rng.standard_normal((1_000_000, C))).astype(np.float32)
    dy, gamma, beta = (1 + x - 1000).astype(np.float32), np.ones(C, np.float32), np.zeros(C, np.float32)
    _, mean, variance = norm.norm_forward(x, gamma, beta, 1e-5, False)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(variance, exact.var(axis=0), rtol=1e-6)
    dgamma, dbeta = np.zeros(C, np.float32), np.zeros(C, np.float32)
    norm.norm_backward(x, dy, gamma, beta, mean, variance, 1e-5, False, dgamma, dbeta)
    normed = (exact - exact.mean(axis=0)) / np.sqrt(exact.var(axis=0) + 1e-5)
    np.testing.assert_allclose(dbeta, dy.sum(axis=0, dtype=np.float64), rtol=1e-5)
    np.testing.assert_allclose(dgamma, (dy * normed).sum(axis=0), rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("C", [5, 32])
def test_what_evaluation_does_with_running_statistics_is_the_formula(dtype: type, C: int) -> None:
    x, gamma, beta, mean, deviation = normal(dtype, (3, 7, C), (C,), (C,), (C,), (C,))
    variance = deviation**2
    y = norm.scale_channels(x, *norm.norm_factors(gamma, beta, mean, variance, 1e-5), True)
    exact = [array.astype(np.float64) for array in (x, gamma, beta, mean, variance)]
    wanted = np.maximum((exact[0] - exact[3]) / np.sqrt(exact[4] + 1e-5) * exact[1] + exact[2], 0)
    assert y.dtype == dtype
    np.testing.assert_allclose(
        y, wanted, rtol=4e-3 if dtype == np.float16 else 1e-4, atol=1e-2 if dtype == np.float16 else 1e-4
    )


def test_channels_that_are_joined_come_apart_again() -> None:
    parts = list(normal(np.float32, (2, 3, 1), (2, 3, 4), (2, 3, 2)))
    joined = elementwise.join_channels(parts)
    assert joined.shape == (2, 3, 7)
    for found, part in zip(elementwise.split_channels(joined, [1, 4, 2]), parts, strict=True):
        np.testing.assert_array_equal(found, part)
        assert found.flags.c_contiguous


@either_precision
def test_sums_and_gradients_behind_relu_are_the_formula(dtype: type) -> None:
    x, other, dy = normal(dtype, (3, 5, 7), (3, 5, 7), (3, 5, 7))
    np.testing.assert_array_equal(elementwise.plus(x, other, False), x + other)
    y = elementwise.plus(x, other, True)
    np.testing.assert_array_equal(y, np.maximum(x + other, 0))
    np.testing.assert_array_equal(elementwise.relu_backward(dy, read_only(y)), np.where(y > 0, dy, 0))
    strange = np.array([np.inf, -np.inf, np.nan], dtype)
    np.testing.assert_array_equal(elementwise.plus(strange, np.ones(3, dtype), True), [np.inf, 0, np.nan])
