"""The layers without filters, losses and batches on a GPU, emulated or real (`pytest -m gpu`), against the CPU's."""

from __future__ import annotations

import numpy as np
import pytest

from distconv.kernels.cpu import arithmetic as cpu
from distconv.kernels.cpu import elementwise
from distconv.kernels.gpu.arithmetic import Gpu
from tests import reference
from tests.gpu import bits, normal, random, whole


@pytest.mark.parametrize(
    ("K", "stride", "pad"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 3, 2), (2, 3, 0), (3, 1, 0), (1, 2, 0), (17, 1, 16)]
)
def test_max_pooling_and_its_gradient(gpu: Gpu, K: int, stride: int, pad: int) -> None:
    device, rng = gpu.device, random(4)
    x = whole(rng, 2, 7, 9, 3) - 10  # below the padding, if that were of zeros
    if not pad and K < 7:
        x[0, 0, 0, 0] = x[0, 3, 4, 1] = np.nan
        x[1, 2:5, 2:5] = -np.inf
    if K > 9:
        x = whole(rng, 1, 18, 3, 1)
    y, winner = cpu.max_pool_forward(x, K, stride, pad)
    dy = normal(rng, *y.shape)
    found_y, found_winner = gpu.max_pool_forward(device.upload(x), K, stride, pad)
    found_dx = gpu.max_pool_backward(device.upload(dy), found_winner, K, stride, pad, x.shape)
    np.testing.assert_array_equal(bits(device.download(found_y)), bits(y))
    np.testing.assert_array_equal(device.download(found_winner), winner)
    dx = cpu.max_pool_backward(dy, winner, K, stride, pad, x.shape)
    np.testing.assert_array_equal(device.download(found_dx), dx)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
def test_an_upload_lies_where_it_is_asked_to(gpu: Gpu, dtype: type) -> None:
    x = np.arange(40).astype(dtype).reshape(5, 8)
    for start in (0, 6, 7, 39):
        there = gpu.device.upload(x, start)
        assert gpu.device.address(there.reshape(-1)[start:]) % 16 == 0
        np.testing.assert_array_equal(gpu.device.download(there), x)


def test_relu_and_scale(gpu: Gpu) -> None:
    device = gpu.device
    x, dy = np.append(normal(random(5), 400), [0, -0.0, np.inf, -np.inf]).astype(np.float32), normal(random(6), 405)
    x = np.append(x, np.float32(np.nan))
    there = device.upload(x)
    np.testing.assert_array_equal(device.download(gpu.relu(there)), elementwise.relu(x))
    np.testing.assert_array_equal(
        bits(device.download(gpu.scale(there, 0.3))), bits(elementwise.scale(x, np.float32(0.3)))
    )
    found = gpu.relu_backward(device.upload(dy[:404]), device.upload(x[:404]))
    np.testing.assert_array_equal(device.download(found), elementwise.relu_backward(dy[:404], x[:404]))


@pytest.mark.parametrize(
    ("ratio", "key", "step"),
    [
        (0.5, (0, 0), 0),
        (0.3, (1, 2**32 - 1), 2**32 + 5),
        (0.9, (2**32 - 1, 7), 2**63 - 1),
        (0, (1, 2), 3),
        (1, (1, 2), 3),
    ],
)
@pytest.mark.parametrize("shape", [(3, 5, 5, 7), (301, 1)])
def test_dropout_drops_the_same_numbers(
    gpu: Gpu, shape: tuple[int, ...], ratio: float, key: tuple[int, int], step: int
) -> None:
    x, samples = normal(random(7), *shape), random(8).integers(0, 2**31, shape[0])
    words = np.array([step % 2**32, step >> 32], np.uint32)
    upload = gpu.device.upload
    found = gpu.dropout(upload(x), ratio, key, upload(words), upload(samples.astype(np.int32)))
    expected = cpu.dropout(x, ratio, key, step, samples)
    np.testing.assert_array_equal(bits(gpu.device.download(found)), bits(expected))


@pytest.mark.parametrize(("N", "classes", "scale"), [(1, 10, 1), (10, 3, 1e4), (300, 10, 5), (257, 1, 1), (0, 10, 1)])
def test_loss_and_its_gradient(gpu: Gpu, N: int, classes: int, scale: float) -> None:
    device, rng = gpu.device, random(9)
    scores, labels = normal(rng, N, classes) * np.float32(scale), rng.integers(0, classes, N)
    arguments = device.upload(scores), device.upload(labels.astype(np.int32)), 64
    (loss, dscores), (again, _) = (map(device.download, gpu.softmax_cross_entropy(*arguments)) for _ in range(2))
    expected_loss, expected = cpu.softmax_cross_entropy(scores.astype(np.float64), labels, 64)
    assert loss.dtype == np.float64 and loss.shape == (1,) and loss == again
    np.testing.assert_allclose(loss[0], expected_loss, rtol=1e-6)
    np.testing.assert_allclose(dscores * 64, expected * 64, rtol=0, atol=1e-6)


def test_the_loss_of_scores_that_are_not_numbers_is_none(gpu: Gpu) -> None:
    scores = normal(random(10), 4, 5)
    scores[1, 3], scores[3, 0] = np.nan, np.inf
    loss, dscores = map(
        gpu.device.download, gpu.softmax_cross_entropy(gpu.device.upload(scores), gpu.device.zeros(4, np.int32))
    )
    assert np.isnan(loss).all()
    assert np.isnan(dscores).any(axis=1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(), (3,), (40,)])  # the last: more labels than pixels
def test_a_batch_has_the_images_and_labels_of_its_samples(gpu: Gpu, dtype: type, shape: tuple[int, ...]) -> None:
    device, rng = gpu.device, random(11)
    images, labels = rng.integers(0, 256, (9, 5, 3, 2)).astype(dtype), rng.integers(0, 2**31, (9, *shape))
    numbers = images / np.float32(255) if dtype == np.uint8 else images
    for samples in np.int32([8, 0, 3, 3, 5, 1, 7, 2, 6, 4, 8]), np.int32([]):  # a rank's share can be empty
        there = device.upload(samples)
        x, chosen = gpu.gather(device.upload(images), gpu.upload_labels(labels), there)
        np.testing.assert_array_equal(bits(device.download(x)), bits(numbers[samples]))
        np.testing.assert_array_equal(device.download(chosen), labels[samples])


def test_random_numbers_are_those_of_the_cpu(gpu: Gpu) -> None:
    samples, key = np.int32([5, 0, 59_999]), (3, 0xDEADBEEF)
    step = gpu.device.upload(np.uint32([7, 1]))
    found = gpu.device.download(gpu.uniform(9, key, step, gpu.device.upload(samples)))
    np.testing.assert_array_equal(found, cpu.uniform(9, key, (1 << 32) + 7, samples))
    assert found.min() >= 0 and found.max() < 1


def test_the_class_of_the_largest_score(gpu: Gpu) -> None:
    scores = whole(random(12), 300, 6)  # ties
    scores[random(13).random(scores.shape) < 0.1] = np.nan
    scores[0], scores[1], scores[2, 3:5] = np.nan, -np.inf, np.inf
    found = gpu.argmax(gpu.device.upload(scores))
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, scores.argmax(axis=1))


@pytest.mark.parametrize(("N", "classes", "smoothing"), [(10, 3, 0.1), (300, 10, 0.5), (257, 1, 0.9), (0, 10, 0.1)])
def test_loss_and_gradient_of_smoothed_labels(gpu: Gpu, N: int, classes: int, smoothing: float) -> None:
    device, rng = gpu.device, random(9)
    scores, labels = normal(rng, N, classes) * np.float32(3), rng.integers(0, classes, N)
    there = device.upload(scores), device.upload(labels.astype(np.int32))
    loss, dscores = map(device.download, gpu.softmax_cross_entropy(*there, 64, smoothing))
    expected_loss, expected = reference.softmax_cross_entropy(scores, labels, smoothing)
    np.testing.assert_allclose(loss[0], expected_loss, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(dscores * 64, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 7, 10, 3), (5, 9, 6, 1), (0, 4, 4, 1)])
@pytest.mark.parametrize(
    "amounts", [(15, 0.1, 0.1, 0, 0, 0, 0), (0, 0, 0, 2, 1, 0.4, 0.5), (180, 0.5, 0.5, 3, 1, 1, 0.3)]
)
def test_images_are_changed_as_numbers_say(gpu: Gpu, shape: tuple[int, ...], amounts: tuple[float, ...]) -> None:
    rng = random(17)
    x, numbers = rng.random(shape, np.float32), rng.random((shape[0], 10), np.float32)
    found = gpu.device.download(gpu.warp(gpu.device.upload(x), gpu.device.upload(numbers), amounts))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference.warp(x, numbers, amounts), rtol=0, atol=1e-5)
    if amounts[0] == 0:
        np.testing.assert_array_equal(found == 0, cpu.warp(x, numbers, amounts) == 0)  # moved by whole pixels
    same = gpu.device.download(gpu.warp(gpu.device.upload(x), gpu.device.upload(numbers), (0,) * 7))
    np.testing.assert_array_equal(bits(same), bits(x))
