"""Batch normalisation, channels and means on a GPU, emulated or real (`pytest -m gpu`), against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distconv.kernels.cpu import arithmetic as cpu
from distconv.kernels.cpu import elementwise
from distconv.kernels.cpu import normalization as cpu_normalization
from distconv.kernels.gpu import normalization
from distconv.kernels.gpu.arithmetic import Gpu
from tests.gpu import Array, bits, normal, random, whole

EPSILON = 1e-5
# Channels by fours and one by one, in one group of threads and in several that are not full; a pixel, a strip, many.
SHAPES = [
    (1, 3), (7, 1), (2, 3, 3, 3), (1, 1, 1, 16), (3, 5, 7, 24), (5, 8, 8, 16), (3000, 1), (2, 40, 30, 20), (9, 33),
    (2, 3, 3, 132), (40, 160), (21, 4, 4, 67),
]  # fmt: skip


def at_any_address(gpu: Gpu, array: Array) -> Any:
    """Not where four numbers can be loaded at once."""
    return gpu.device.upload(np.append(np.float32(np.nan), array))[1:].reshape(array.shape)


def normalized(gpu: Gpu, x: Array, dy: Array, relu: bool, put: Callable[[Array], Any]) -> list[Array]:
    """y, mean, variance and dx, dgamma, dbeta that began as ones."""
    C, rng = x.shape[-1], random(2)
    gamma, beta = map(gpu.device.upload, (normal(rng, C), normal(rng, C)))
    dgamma, dbeta = (gpu.device.upload(np.ones(C, np.float32)) for _ in range(2))
    there = put(x)
    y, mean, variance = gpu.norm_forward(there, gamma, beta, EPSILON, relu)
    dx = gpu.norm_backward(there, put(dy), gamma, beta, mean, variance, EPSILON, relu, dgamma, dbeta)
    return [gpu.device.download(array) for array in (y, mean, variance, dx, dgamma, dbeta)]


def expected(x: Array, dy: Array, relu: bool, found_y: Array) -> list[Array]:
    """The same by its formulas, axis by axis. found_y: where ReLU let through, as rounding may decide."""
    x, dy, rng, C = x.astype(np.float64), dy.astype(np.float64), random(2), x.shape[-1]
    gamma, beta = normal(rng, C).astype(np.float64), normal(rng, C).astype(np.float64)
    axes = tuple(range(x.ndim - 1))
    mean, variance = x.mean(axes), x.var(axes)
    s = (x - mean) / np.sqrt(variance + EPSILON)
    y, g = gamma * s + beta, np.where(found_y > 0, dy, 0) if relu else dy
    dx = gamma / np.sqrt(variance + EPSILON) * (g - g.mean(axes) - s * (g * s).mean(axes))
    return [np.maximum(y, 0) if relu else y, mean, variance, dx, 1 + (g * s).sum(axes), 1 + g.sum(axes)]


def assert_close(found: list[Array], wanted: list[Array], bound: float = 3e-6) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == np.float32 and one.shape == other.shape
        assert np.linalg.norm(one - other) <= bound * (np.linalg.norm(other) + 1)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_normalisation_and_its_gradient(gpu: Gpu, shape: tuple[int, ...], relu: bool) -> None:
    x, dy = normal(random(1), *shape) + np.float32(0.5), normal(random(3), *shape)
    for put in (gpu.device.upload, lambda array: at_any_address(gpu, array)):
        found = normalized(gpu, x, dy, relu, put)
        assert_close(found, expected(x, dy, relu, found[0]))


@pytest.mark.parametrize("most", [1, 2, 264])
def test_strips_of_many_pixels_and_many_strips(gpu: Gpu, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are with more pixels than a test can have: threads that go on, and some that join several strips."""
    monkeypatch.setattr(normalization, "ENOUGH_BLOCKS", most)
    x, dy = normal(random(1), 5, 20, 13, 128), normal(random(3), 5, 20, 13, 128)
    found, again = (normalized(gpu, x, dy, True, gpu.device.upload) for _ in range(2))
    assert_close(found, expected(x, dy, True, found[0]))
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))


def test_a_large_mean_costs_the_variance_nothing(gpu: Gpu) -> None:
    x = normal(random(1), 3000, 5) + np.float32([0, 10, 100, 1000, 10_000])
    _, mean, variance, *_ = normalized(gpu, x, x, False, gpu.device.upload)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(variance, x.astype(np.float64).var(axis=0), rtol=1e-4)
    constant = np.full((3000, 4), 1234.567, np.float32)
    y, _, variance, *_ = normalized(gpu, constant, constant, False, gpu.device.upload)
    assert not variance.any() and (y == y[0]).all()


def test_the_statistics_of_no_pixels_move_nothing(gpu: Gpu) -> None:
    x = np.empty((0, 4, 4, 16), np.float32)
    y, mean, variance, dx, dgamma, dbeta = normalized(gpu, x, x, True, gpu.device.upload)
    assert y.shape == dx.shape == x.shape
    assert not mean.any() and not variance.any() and (dgamma == 1).all() and (dbeta == 1).all()


def test_what_is_not_a_number_stays_in_its_channel(gpu: Gpu) -> None:
    x = normal(random(1), 300, 5)
    x[7, 2] = np.nan
    y, mean, variance, dx, *_ = normalized(gpu, x, np.ones_like(x), True, gpu.device.upload)
    for found in (y, mean, variance, dx):
        assert np.isnan(found).any(axis=tuple(range(found.ndim - 1))).tolist() == [False, False, True, False, False]


def test_running_statistics_and_factors(gpu: Gpu) -> None:
    arrays = [np.abs(normal(random(i), 300)) for i in range(6)]
    here, there = [array.copy() for array in arrays], [gpu.device.upload(array) for array in arrays]
    cpu_normalization.norm_follow(*here, 0.1, 1.01)
    gpu.norm_follow(*there, 0.1, 1.01)
    for found, wanted in zip(there, here, strict=True):
        np.testing.assert_allclose(gpu.device.download(found), wanted, rtol=1e-5, atol=1e-6)
    found = gpu.norm_factors(*there[:4], EPSILON)
    for one, wanted in zip(found, cpu_normalization.norm_factors(*here[:4], EPSILON), strict=True):
        np.testing.assert_allclose(gpu.device.download(one), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 2, 2, 4)], ids=str)
def test_channels_are_scaled(gpu: Gpu, shape: tuple[int, ...], relu: bool) -> None:
    """Of images and, where layers are folded, of filters, which may lie at any address."""
    x, factor, offset = whole(random(1), *shape), whole(random(2), shape[-1]), whole(random(3), shape[-1])
    wanted = np.maximum(x * factor + offset, 0) if relu else x * factor + offset
    for put in (gpu.device.upload, lambda array: at_any_address(gpu, array)):
        found = gpu.scale_channels(put(x), gpu.device.upload(factor), gpu.device.upload(offset), relu)
        np.testing.assert_array_equal(gpu.device.download(found), wanted)


@pytest.mark.parametrize("relu", [False, True])
def test_two_arrays_are_added(gpu: Gpu, relu: bool) -> None:
    x, other = normal(random(1), 3, 5, 5, 7), normal(random(2), 3, 5, 5, 7)
    x[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    found = gpu.plus(gpu.device.upload(x), gpu.device.upload(other), relu)
    np.testing.assert_array_equal(gpu.device.download(found), elementwise.plus(x, other, relu))


@pytest.mark.parametrize("sizes", [(5,), (3, 1), (4, 2, 7), (1, 16, 3, 2), (1, 2, 3, 4, 5, 6, 7, 8, 9)], ids=str)
def test_channels_are_joined_and_split(gpu: Gpu, sizes: tuple[int, ...]) -> None:
    for pixels in ((3, 4, 5), (0, 2, 2), (70,)):
        parts = [normal(random(i), *pixels, size) for i, size in enumerate(sizes)]
        joined = gpu.join_channels([gpu.device.upload(part) for part in parts])
        np.testing.assert_array_equal(gpu.device.download(joined), np.concatenate(parts, axis=-1))
        for found, part in zip(gpu.split_channels(joined, sizes), parts, strict=True):
            np.testing.assert_array_equal(gpu.device.download(found), part)


@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 3, 2), (2, 3, 0), (1, 2, 0)], ids=str)
def test_average_pooling_and_its_gradient(gpu: Gpu, window: tuple[int, int, int]) -> None:
    x = normal(random(1), 3, 7, 9, 5)
    y = cpu.average_pool_forward(x.astype(np.float64), *window)
    dy = normal(random(2), *y.shape)
    dx = cpu.average_pool_backward(dy.astype(np.float64), *window, x.shape)
    found = gpu.device.download(gpu.average_pool_forward(gpu.device.upload(x), *window))
    np.testing.assert_allclose(found, y, rtol=1e-6, atol=1e-6)
    found = gpu.device.download(gpu.average_pool_backward(gpu.device.upload(dy), *window, x.shape))
    np.testing.assert_allclose(found, dx, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 8, 8, 5), (1, 1, 1, 1), (2, 2, 2, 67), (2, 13, 3, 32), (0, 4, 4, 3)], ids=str)
def test_the_mean_of_all_pixels_and_its_gradient(gpu: Gpu, shape: tuple[int, ...]) -> None:
    x, dy = normal(random(1), *shape), normal(random(2), shape[0], shape[-1])
    found = gpu.device.download(gpu.pixel_mean(gpu.device.upload(x)))
    np.testing.assert_allclose(found, x.mean(axis=(1, 2), dtype=np.float64), rtol=1e-6, atol=1e-6)
    found = gpu.device.download(gpu.pixel_mean_backward(gpu.device.upload(dy), shape))
    wanted = np.broadcast_to(dy[:, None, None] / (shape[1] * shape[2]), shape)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_gradients_may_be_views(gpu: Gpu) -> None:
    """As those of a user's layer that cuts them out of others."""
    x, wide = normal(random(1), 6, 5, 5, 16), normal(random(3), 6, 5, 5, 20)
    found = normalized(gpu, x, wide, True, lambda array: gpu.device.upload(array)[..., :16])
    assert_close(found, expected(x, wide[..., :16], True, found[0]))


def test_more_pixels_than_32_bits_count_are_refused(gpu: Gpu) -> None:
    x, channel = np.broadcast_to(np.float32(1), (2**16, 2**8, 2**7, 1)), gpu.device.zeros(1, np.float32)
    for refused in (
        lambda: gpu.norm_forward(x, channel, channel, EPSILON, True),
        lambda: gpu.scale_channels(x, channel, channel, True),
        lambda: gpu.pixel_mean(x),
    ):
        with pytest.raises(ValueError, match=r"2,147,483,648 numbers are more than .*: use a smaller batch"):
            refused()
