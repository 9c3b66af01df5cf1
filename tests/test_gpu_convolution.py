"""Convolutions and affine layers on a GPU, emulated or real (`pytest -m gpu`), against those of the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from distconv.kernels.cpu import arithmetic as cpu
from distconv.kernels.gpu import convolution
from distconv.kernels.gpu.arithmetic import Gpu
from tests.gpu import Array, bits, error, normal, random, whole
from tests.test_emulator import to_bfloat16, to_float16, to_tf32

NOBODY = 4  # in place of a winner: ReLU let none of its window through


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


# Those with a stride, of images below 16 pixels, or of many taps are for convolution.cu, which cuts depths from 128 on
# into slices. The others are for the direct kernels. Four numbers are loaded at once where C or F is a multiple of 4.
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
    "in bands": Case(2, 26, 18, 16, 16, 3, 1, 1, relu=True, pooled=True),  # the last of them is not full
    "bands of an odd width": Case(1, 19, 23, 16, 24, 3, 1, 0, relu=True, pooled=True),  # rows and columns in no window
    "a whole image": Case(3, 11, 12, 16, 32, 3, 1, 2, relu=True),  # 32 filters at once, rows of y filled up
    "many small images": Case(10, 5, 4, 32, 16, 3, 1, 1, relu=False),  # more than a block takes, and a rest
    "small images of odd heights, pooled": Case(10, 7, 4, 16, 16, 3, 1, 1, relu=True, pooled=True),
    "colours of odd heights, pooled": Case(9, 5, 4, 3, 16, 3, 1, 1, relu=False, pooled=True),
    "few filters of many channels": Case(5, 8, 8, 16, 48, 3, 1, 1, relu=True, pooled=True),
    "five by five, directly": Case(2, 9, 7, 16, 20, 5, 1, 2, relu=True),
    "one by one, directly": Case(3, 6, 6, 16, 32, 1, 1, 0, relu=True),
    "colours in bands": Case(2, 17, 16, 3, 16, 3, 1, 1, relu=True),
    "more padding than taps": Case(2, 5, 5, 16, 16, 1, 1, 2, relu=True),
}


class Factors(NamedTuple):
    """What a convolution and its gradient are made of."""

    x: Array
    w: Array
    b: Array
    dy: Array


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


@pytest.mark.parametrize("name", ["odd everything", "many small images", "colours in bands"])
def test_convolution_without_bias(gpu: Gpu, name: str) -> None:
    """Where products are made by convolution.cu in slices, and by the direct kernels, of many channels and of few."""
    case = CASES[name]
    of = factors(case, whole)
    of.b[...] = 0
    y, gate = forward(case, of)
    window = case.stride, case.pad, case.relu
    x, w, dy = map(gpu.device.upload, (of.x, of.w, of.dy))
    found = gpu.conv_forward(x, w, None, *window)
    np.testing.assert_array_equal(gpu.device.download(found), y)
    dw = gpu.device.upload(np.ones_like(of.w))
    dx = gpu.conv_backward(x, found, dy, w, *window, dw, None, True)
    wanted_dx, wanted_dw, _ = backward(case, of, gate)
    np.testing.assert_array_equal(gpu.device.download(dx), wanted_dx)
    np.testing.assert_array_equal(gpu.device.download(dw), wanted_dw)


def test_filters_at_any_address(gpu: Gpu) -> None:
    for start in (1, 4):
        assert_equal_to_the_cpu(gpu, CASES["pooled in slices"], start)
        assert_equal_to_the_cpu(gpu, CASES["padding beyond the window"], start)


@pytest.mark.parametrize("name", ["in bands", "many small images", "colours in bands"])
def test_a_block_that_goes_through_many_tiles(gpu: Gpu, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does with more images than a test can have."""
    monkeypatch.setattr(convolution, "ENOUGH_BLOCKS", 2)
    case = CASES[name]
    shape = convolution.Convolution(case.H, case.W, case.C, case.F, case.K, 1, case.pad, case.relu, case.pooled)
    plan = shape.plan("filters", case.N, gpu.precision, aligned=True)
    assert plan.file == "direct_filters" and plan.slice > 1
    assert_equal_to_the_cpu(gpu, case)


@pytest.mark.parametrize("name", ["affine", "two blocks of filters"])  # one slice, and several
def test_more_columns_than_a_grid_is_wide(gpu: Gpu, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an affine layer of more than 2 Mi inputs has."""
    wide = convolution.Convolution(1, 1, 2**22, 10, 1, 1, 0, relu=False)
    grid = wide.plan("input", 100, gpu.precision, aligned=True).grid
    assert grid[0] < 2**31 and max(grid[1:]) < 2**16
    monkeypatch.setattr(convolution, "MOST_ACROSS", 1)
    assert_equal_to_the_cpu(gpu, CASES[name])


@pytest.mark.slow
def test_convolutions_of_any_shape(gpu: Gpu) -> None:
    rng = random(5)
    for _ in range(12):
        K, H, W = (int(size) for size in (rng.choice([1, 2, 3, 5]), *rng.integers(5, 30, 2)))
        C, F = (int(rng.choice([1, 3, 4, 16, 20, 32])) for _ in range(2))
        pad, stride = int(rng.integers(0, K + 1)), int(rng.choice([1, 1, 1, 2]))
        pooled = stride == 1 and bool(rng.integers(2))
        case = Case(int(rng.integers(1, 4)), H, W, C, F, K, stride, pad, bool(rng.integers(2)), pooled)
        assert_equal_to_the_cpu(gpu, case)


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
@pytest.mark.parametrize(
    "name", ["one channel", "five by five", "as deep as deepconvnet", "affine", "in bands", "many small images"]
)
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
