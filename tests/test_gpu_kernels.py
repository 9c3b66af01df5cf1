"""The kernels of the GPU against those of the CPU: on the emulator, and on a GPU where there is one (`pytest -m gpu`).

Small whole numbers are multiplied and added up without rounding in every precision and order, so most results must be
equal to the last bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from distconv.comm.wire import WIRES
from distconv.kernels.cpu import arithmetic as cpu
from distconv.kernels.gpu.arithmetic import Gpu
from distconv.kernels.gpu.device import Cuda, visible
from distconv.kernels.interface import BLOCK, FINITE
from distconv.nn.optimizers import OPTIMIZERS, Optimizer
from tests import emulator
from tests.test_emulator import to_bfloat16, to_float16, to_tf32

Array = NDArray[Any]
NOBODY = 4  # in place of a winner: ReLU let none of its window through


class PoisonedCuda(Cuda):
    """A GPU where, as on the emulator, new arrays are full of NaN: what a kernel forgets to write shows."""

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Any:
        array = super().empty(shape, dtype)
        array.reshape(-1).view(np.uint8).fill(0xFF)
        return array


emulated = pytest.param(
    "emulated", marks=pytest.mark.skipif(not emulator.available(), reason="kernels are emulated with g++ on Linux")
)


@pytest.fixture(scope="module", params=[emulated, pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Any:
    if request.param == "emulated":
        return emulator.Emulator()
    try:
        visible()
    except RuntimeError as error:
        pytest.skip(str(error))
    return PoisonedCuda(0, print)


@pytest.fixture
def gpu(device: Any) -> Gpu:
    return Gpu(device)


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def bits(x: Array) -> Array:
    """Of float32, where one NaN is as good as another."""
    return np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32)


def error(found: Array, exact: Array) -> float:
    """Relative to the norm."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


# Convolutions


class Case(NamedTuple):
    """A convolution, perhaps with pooling in windows of 2 x 2."""

    N: int
    H: int
    W: int
    C: int
    F: int
    K: int
    stride: int
    pad: int
    relu: bool
    pooled: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of y before pooling."""
        OH, OW = (cpu.output_size(size, self.K, self.stride, self.pad) for size in (self.H, self.W))
        return self.N, OH, OW, self.F

    @property
    def out(self) -> tuple[int, int, int, int]:
        N, OH, OW, F = self.shape
        return (N, OH // 2, OW // 2, F) if self.pooled else self.shape


# A block of threads computes 128 x 16, 64 x 32 or 64 x 64 numbers of a product, by its columns: F, or C for dx. Depths
# from 128 on are cut into slices. Four numbers are loaded at once where C or F is a multiple of 4.
CASES = {
    "one channel": Case(4, 7, 6, 1, 16, 3, 1, 1, relu=True),  # all passes in slices, two blocks one below the other
    "odd everything": Case(2, 9, 7, 3, 5, 3, 2, 2, relu=False),
    "two blocks of filters": Case(2, 5, 4, 4, 68, 3, 1, 0, relu=True),  # dx in nine slices
    "padding beyond the window": Case(2, 4, 5, 2, 3, 1, 3, 1, relu=True),
    "five by five": Case(2, 9, 8, 8, 20, 5, 3, 2, relu=True),
    "image within the window": Case(3, 1, 1, 2, 4, 3, 1, 1, relu=True),
    "pooled without ReLU": Case(3, 8, 7, 1, 6, 5, 1, 0, relu=False, pooled=True),
    "pooled in slices": Case(2, 6, 6, 16, 36, 3, 1, 1, relu=True, pooled=True),
    "pooled with stride": Case(2, 9, 10, 3, 20, 3, 2, 1, relu=True, pooled=True),  # a row and a column in no window
    "as deep as deepconvnet": Case(4, 8, 8, 64, 64, 3, 1, 1, relu=True, pooled=True),  # its conv6
    "affine": Case(70, 1, 1, 68, 51, 1, 1, 0, relu=True),
}


class Factors(NamedTuple):
    """What a convolution and its gradient are made of."""

    x: Array
    w: Array
    b: Array
    dy: Array


def whole(rng: np.random.Generator, *shape: int) -> Array:
    """Small whole numbers, so many of them equal that windows of a pooling have ties."""
    return rng.integers(-3, 4, shape).astype(np.float32)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def factors(case: Case, draw: Any) -> Factors:
    rng, K, C, F = random(1), case.K, case.C, case.F
    return Factors(draw(rng, case.N, case.H, case.W, C), draw(rng, K, K, C, F), draw(rng, F), draw(rng, *case.out))


def forward(case: Case, of: Factors) -> tuple[Array, Array]:
    """In float64 -> y and what tells where its gradient counts: the winners of a pooling, or y."""
    x, w, b, _ = (factor.astype(np.float64) for factor in of)
    y = cpu.conv_forward(x, w, b, case.stride, case.pad, case.relu)
    if not case.pooled:
        return y, y
    y, winner = cpu.max_pool_forward(y, 2, 2, 0)
    return y, np.where((y <= 0) & case.relu, NOBODY, winner)


def backward(case: Case, of: Factors, gate: Array) -> tuple[Array, Array, Array]:
    """In float64 -> dx, dw, db"""
    x, w, b, dy = (factor.astype(np.float64) for factor in of)
    if case.pooled:
        dy = cpu.max_pool_backward(dy, gate, 2, 2, 0, case.shape)
    dw, db = np.ones_like(w), np.ones_like(b)  # to be added to
    dx = cpu.conv_backward(x, gate, dy, w, case.stride, case.pad, case.relu and not case.pooled, dw, db, True)
    assert dx is not None
    return dx, dw, db


def forward_on(gpu: Gpu, case: Case, of: Factors, start: int = 0) -> tuple[Array, Array]:
    """The same on a GPU; the filters begin `start` numbers behind an aligned address."""
    device = gpu.device
    x, w, b = device.upload(of.x), filters_on(device, of.w, start), device.upload(of.b)
    if case.pooled:
        y, gate = gpu.conv_pool_forward(x, w, b, case.stride, case.pad, case.relu)
    else:
        y = gate = gpu.conv_forward(x, w, b, case.stride, case.pad, case.relu)
    return device.download(y), device.download(gate)


def filters_on(device: Any, w: Array, start: int) -> Any:
    return device.upload(np.append(np.zeros(start, np.float32), w))[start:].reshape(w.shape)


def backward_on(gpu: Gpu, case: Case, of: Factors, gate: Array, start: int = 0) -> tuple[Array, Array, Array]:
    """The same on a GPU, with the gradients as parts of one vector, at any address."""
    device, size = gpu.device, of.w.size
    before = np.ones(size + len(of.b) + 3, np.float32)
    before[[0, size + 1, -1]] = np.nan
    gradients = device.upload(before)
    dw, db = gradients[1 : size + 1].reshape(of.w.shape), gradients[size + 2 : -1]
    gate = gate.astype(np.uint8 if case.pooled else np.float32)
    x, gate, dy, w = device.upload(of.x), device.upload(gate), device.upload(of.dy), filters_on(device, of.w, start)
    function = gpu.conv_pool_backward if case.pooled else gpu.conv_backward
    dx = function(x, gate, dy, w, case.stride, case.pad, case.relu, dw, db, True)
    assert np.isnan(device.download(gradients)[[0, size + 1, -1]]).all(), "written beside dw or db"
    return device.download(dx), device.download(dw), device.download(db)


def assert_equal_to_the_cpu(gpu: Gpu, case: Case, start: int = 0) -> None:
    of = factors(case, whole)
    y, gate = forward(case, of)
    for found, expected in zip(forward_on(gpu, case, of, start), (y, gate), strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(backward_on(gpu, case, of, gate, start), backward(case, of, gate), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_convolution_and_its_gradients(gpu: Gpu, case: Case) -> None:
    assert_equal_to_the_cpu(gpu, case)


def test_filters_at_any_address(gpu: Gpu) -> None:
    for start in (1, 4):
        assert_equal_to_the_cpu(gpu, CASES["pooled in slices"], start)


def test_no_gradient_of_the_images_where_nobody_wants_it(gpu: Gpu) -> None:
    case = CASES["pooled in slices"]
    x, w, _, dy = map(gpu.device.upload, factors(case, whole))
    winner, dw = gpu.device.zeros(case.out, np.uint8), gpu.device.zeros(w.shape, np.float32)
    db = gpu.device.zeros(case.F, np.float32)
    assert gpu.conv_pool_backward(x, winner, dy, w, 1, 1, True, dw, db, wants_dx=False) is None
    assert gpu.device.download(dw).any()


ROUNDED = {"float32": np.asarray, "tf32": to_tf32, "float16": to_float16, "bfloat16": to_bfloat16}
TOLERANCE = {"float32": 1e-6, "tf32": 1e-3, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.mark.parametrize("precision", ROUNDED)
# Between them, all three sizes of a block, one slice and several, and factors that are loaded one by one and by fours.
@pytest.mark.parametrize("name", ["one channel", "five by five", "as deep as deepconvnet", "affine"])
def test_the_precisions_round_the_factors_and_nothing_else(device: Any, name: str, precision: str) -> None:
    gpu, case = Gpu(device, precision), CASES[name]
    assert_equal_to_the_cpu(gpu, case)

    def everything(of: Factors) -> tuple[Array, ...]:
        return forward(case, of)[0], *backward(case, of, gate)

    of = factors(case, normal)
    rounded = of._replace(**{factor: ROUNDED[precision](getattr(of, factor)) for factor in ("x", "w", "dy")})
    gate = random(2).integers(0, 5, case.out)  # not from y, whose signs and ties depend on its rounding
    found = [(forward_on(gpu, case, of)[0], *backward_on(gpu, case, of, gate)) for _ in range(2)]
    for one, again, exact, nearly in zip(*found, everything(of), everything(rounded), strict=True):
        np.testing.assert_array_equal(bits(one), bits(again))
        assert error(one, exact) < TOLERANCE[precision]
        assert error(one, nearly) < (1e-6 if precision == "float32" else 1e-5)  # tensor cores add up a bit less exactly


@pytest.mark.parametrize("name", ["one channel", "pooled with stride", "pooled in slices"])
def test_what_is_not_a_number_passes_through_convolution_relu_and_pooling(gpu: Gpu, name: str) -> None:
    case = CASES[name]
    of = factors(case, whole)
    of.x[0, 0, 0, 0], of.x[1, 3, 3, 0] = np.nan, np.nan
    expected = forward(case, of)
    assert 0 < np.isnan(expected[0]).sum() < expected[0].size
    for found, wanted in zip(forward_on(gpu, case, of), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_what_is_infinite_gives_nothing_finite(gpu: Gpu) -> None:
    case = CASES["one channel"]
    of = factors(case, whole)
    of.x[1, 3, 3, 0], of.x[1, 0, 4, 0] = np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        y, _ = forward(case, of)
    assert np.isinf(y).any()
    assert not np.isfinite(forward_on(gpu, case, of)[0][~np.isfinite(y)]).any()  # a NaN, where NumPy has infinity


@pytest.mark.parametrize(("N", "C", "F", "relu"), [(5, 130, 10, False), (70, 68, 51, True)])
def test_affine_layer_and_its_gradients(gpu: Gpu, N: int, C: int, F: int, relu: bool) -> None:
    device, rng = gpu.device, random(3)
    x, w, b, dy = whole(rng, N, C), whole(rng, C, F), whole(rng, F), whole(rng, N, F)
    y, dw, db = cpu.affine_forward(x, w, b, relu), np.zeros_like(w), np.zeros_like(b)
    dx = cpu.affine_backward(x, y, dy, w, relu, dw, db)

    x, w, b, dy = map(device.upload, (x, w, b, dy))
    found_y, found_dw, found_db = gpu.affine_forward(x, w, b, relu), device.zeros((C, F), "f4"), device.zeros(F, "f4")
    found_dx = gpu.affine_backward(x, found_y, dy, w, relu, found_dw, found_db)
    for found, expected in ((found_y, y), (found_dx, dx), (found_dw, dw), (found_db, db)):
        np.testing.assert_array_equal(device.download(found), expected)


def test_more_numbers_than_32_bits_count_are_refused(gpu: Gpu) -> None:
    one = np.float32(1)
    x, y = np.broadcast_to(one, (2**25, 8, 8, 1)), np.broadcast_to(one, (2**25, 8, 8, 4))
    with pytest.raises(ValueError, match="more than a kernel can count: use a smaller batch"):
        gpu.conv_backward(x, y, y, np.broadcast_to(one, (1, 1, 1, 4)), 1, 0, True, None, None, False)
    with pytest.raises(ValueError, match=r"relu: 2,147,483,648 numbers are more than .*: use a smaller batch"):
        gpu.launch("layers", "relu", 2**31)


# The layers without filters


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


def test_relu_and_scale(gpu: Gpu) -> None:
    device = gpu.device
    x, dy = np.append(normal(random(5), 400), [0, -0.0, np.inf, -np.inf]).astype(np.float32), normal(random(6), 405)
    x = np.append(x, np.float32(np.nan))
    there = device.upload(x)
    np.testing.assert_array_equal(device.download(gpu.relu(there)), cpu.relu(x))
    np.testing.assert_array_equal(bits(device.download(gpu.scale(there, 0.3))), bits(cpu.scale(x, np.float32(0.3))))
    found = gpu.relu_backward(device.upload(dy[:404]), device.upload(x[:404]))
    np.testing.assert_array_equal(device.download(found), cpu.relu_backward(dy[:404], x[:404]))


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
def test_a_batch_has_the_images_and_labels_of_its_samples(gpu: Gpu, dtype: type) -> None:
    device, rng = gpu.device, random(11)
    images, labels = rng.integers(0, 256, (9, 5, 3, 2)).astype(dtype), rng.integers(0, 2**31, (9, 3)).astype(np.int64)
    numbers = images / np.float32(255) if dtype == np.uint8 else images
    for samples in np.int32([8, 0, 3, 3, 5, 1, 7, 2, 6, 4, 8]), np.int32([]):  # a rank's share can be empty
        there = device.upload(samples)
        x, chosen = gpu.gather(device.upload(images), there), gpu.gather_labels(gpu.upload_labels(labels), there)
        np.testing.assert_array_equal(bits(device.download(x)), bits(numbers[samples]))
        np.testing.assert_array_equal(device.download(chosen), labels[samples])


def test_a_step_begins_without_gradient_and_without_a_bad_number(gpu: Gpu) -> None:
    gradient, bad = gpu.device.upload(np.full(5, np.nan, np.float32)), gpu.device.zeros(2, np.int32)
    gpu.begin_step(gradient, bad)
    assert gpu.device.download(gradient).tolist() == [0] * 5
    assert gpu.device.download(bad).tolist() == [FINITE, FINITE]


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


# The wire

wire = WIRES["float16"]


def numbers(kind: str, n: int, seed: int = 14) -> Array:
    """A vector (n,) of float32."""
    rng = random(seed)
    x = rng.standard_normal(n) * rng.lognormal(0, 3, n)
    if kind == "mixed":  # other magnitudes in every block
        x *= 10 ** rng.uniform(-44, 36, n // BLOCK + 1).repeat(BLOCK)[:n]
        x[rng.random(n) < 0.05] = -0.0
        x[BLOCK : 2 * BLOCK] = 0
    x = np.float32(np.clip(x * {"tiny": 1e-41, "huge": 1e38}.get(kind, 1), -3.4e38, 3.4e38))
    if kind == "not finite":
        x[rng.permutation(n)[: n // 40 + 1]] = rng.choice(np.float32([np.nan, np.inf, -np.inf]), n // 40 + 1)
        x[: min(BLOCK, n // 2)] = 1
        x[-min(BLOCK, n // 2 + 1) :] = np.nan
    return x


def assert_same_messages(found: Array, expected: Array, n: int, part: int, stride: int) -> None:
    """Equal 16-bit words, what was not written included, but any NaN for a NaN."""
    places = np.arange(n) // part * stride + np.arange(n) % part
    places = places[np.isnan(expected[places].view(np.float16))]
    assert np.isnan(found[places].view(np.float16)).all()
    found[places] = expected[places]
    np.testing.assert_array_equal(found, expected)


def first_bad(x: Array) -> int:
    return int(np.argmin(np.isfinite(x))) if not np.isfinite(x).all() else FINITE


@pytest.mark.parametrize("kind", ["ordinary", "tiny", "huge", "mixed", "not finite"])
@pytest.mark.parametrize(("n", "P"), [(1, 1), (512, 1), (1000, 3), (2100, 4)])  # of (1000, 3), the last part is empty
def test_a_vector_travels_as_on_the_cpu(gpu: Gpu, n: int, P: int, kind: str) -> None:
    device, x = gpu.device, numbers(kind, n)
    part = -(-n // (P * BLOCK)) * BLOCK
    nbytes = wire.nbytes(part)
    stride = nbytes // 2
    messages, arrived = np.full((P, nbytes), 0xFF, np.uint8), np.empty_like(x)
    for message, start in zip(messages, range(0, n, part), strict=False):
        wire.encode(x[start : start + part], message)
        wire.decode(message, arrived[start : start + part])
    words = messages.ravel().view(np.uint16)

    found, bad_at = device.empty(P * stride, np.uint16), device.upload(np.full(3, FINITE, np.int32))
    gpu.launch("wire", "encode", n, device.upload(x), found, n, part, stride, bad_at[0:1])
    assert_same_messages(device.download(found), words, n, part, stride)

    found = device.empty(n, np.float32)
    gpu.launch("wire", "decode", n, device.upload(words), found, n, part, stride, bad_at[1:2])
    np.testing.assert_array_equal(bits(device.download(found)), bits(arrived))

    gpu.launch("wire", "find_bad", n, device.upload(x), n, bad_at[2:3])
    assert device.download(bad_at).tolist() == [first_bad(x), first_bad(arrived), first_bad(x)]


@pytest.mark.parametrize(
    "kinds", [("ordinary",) * 4, ("mixed", "tiny"), ("huge",) * 3, ("not finite", "mixed", "huge")]
)
def test_a_part_is_added_up_as_on_the_cpu(gpu: Gpu, kinds: tuple[str, ...]) -> None:
    device, P, n, part = gpu.device, len(kinds), 700, 1024
    contributions = [numbers(kind, n, seed) for seed, kind in enumerate(kinds)]
    nbytes = wire.nbytes(part)
    received, message = np.full((P, nbytes), 0xFF, np.uint8), np.full(nbytes, 0xFF, np.uint8)
    for rank, own in enumerate(contributions):
        with np.errstate(all="ignore"):
            for r, other in enumerate(contributions):
                wire.encode(other, received[r])
            received[rank] = 0xFF  # nobody sends a message to itself
            wire.sum_and_encode(own, rank, P, received.ravel(), 0, nbytes, message)
        words, found = device.upload(received.ravel().view(np.uint16)), device.empty(nbytes // 2, np.uint16)
        gpu.launch("wire", "sum_and_encode", n, device.upload(own), rank, P, words, nbytes // 2, part, found, n)
        assert_same_messages(device.download(found), message.view(np.uint16), n, part, nbytes // 2)


# The optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(gpu: Gpu, name: str) -> None:
    device, rng, n = gpu.device, random(15), 700
    optimizer: Optimizer = OPTIMIZERS[name](0.1)
    p, state = rng.standard_normal(n), optimizer.new_state(n, np.float64)
    vectors = [device.upload(vector.astype(np.float32)) for vector in (p, *state.values())]
    for t in (1, 2, 3):
        g = normal(rng, n) * (rng.random(n) < 0.9)
        there, numbers = device.upload(g.astype(np.float32)), device.upload(np.float32(optimizer.numbers(t)))
        for bad_sum in (n - 1, FINITE):  # in this order: what is not finite changes nothing
            bad = device.upload(np.int32([FINITE, bad_sum]))
            gpu.update(optimizer, vectors[0], there, vectors[1:], numbers, bad)
        optimizer.step(p, g.astype(np.float64), optimizer.numbers(t), *state.values())
        for found, expected in zip(vectors, (p, *state.values()), strict=True):
            assert error(device.download(found), expected) < 1e-6


def test_what_decays_and_what_is_moved_by_its_layer(gpu: Gpu) -> None:
    device, p, g = gpu.device, np.arange(300, dtype=np.float32), np.ones(300, np.float32)
    there, numbers = device.upload(p), device.upload(np.float32([0.5, 9]))
    for bad_sum in (3, FINITE):
        bad = device.upload(np.int32([FINITE, bad_sum]))
        gpu.decay(there, numbers, bad)
        gpu.add(there, device.upload(g), bad)
    np.testing.assert_array_equal(device.download(there), p / 2 + 1)
