"""The compiled kernels against the NumPy road in float64."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distconv.kernels.cpu import arithmetic as cpu
from distconv.kernels.cpu.products import matmul
from distconv.kernels.cpu.vector import LANES
from distconv.kernels.interface import SHUT
from tests import reference

TOLERANCE = 1e-4  # of each tensor's norm

# H, W, C, F, pad: the six layers of DeepConvNet, then sizes that fill no tile, all pads, one pixel of output.
NETWORK = [
    (28, 28, 1, 16, 1),
    (28, 28, 16, 16, 1),
    (14, 14, 16, 32, 1),
    (14, 14, 32, 32, 2),
    (8, 8, 32, 64, 1),
    (8, 8, 64, 64, 1),
]
ODD = [
    (3, 3, 16, 16, 0),
    (3, 3, 1, 32, 0),
    (5, 9, 32, 16, 0),
    (7, 6, 16, 48, 1),
    (1, 2, 48, 16, 1),
    (4, 11, 16, 32, 2),
    (9, 5, 1, 16, 2),
    (1, 1, 16, 16, 3),
]
REFUSED = [
    (7, 6, 15, 16, 1),
    (7, 6, 16, 17, 1),
    (6, 6, 3, 16, 1),
]  # channels that fill no vector: NumPy, for dx at least
cases = pytest.mark.parametrize(("H", "W", "C", "F", "pad"), NETWORK + ODD + REFUSED)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected)


def sparse(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Images of zeros, but for a rectangle in some channels."""
    x = np.zeros(shape, np.float32)
    for image in x:
        top, left = rng.integers(0, shape[1]), rng.integers(0, shape[2])
        part = image[top : top + 3, left : left + 6, rng.integers(0, shape[3], 3)]
        image[top : top + 3, left : left + 6, rng.integers(0, shape[3], 3)] = rng.standard_normal(part.shape)
    return x


def backward(x, y, dy, w, pad, relu, wants_dx, stride=1):
    dw, db = np.zeros_like(w), np.zeros(w.shape[3], w.dtype)
    for _ in range(2):  # what is there stays in the sum
        dx = cpu.conv_backward(x, y, dy, w, stride, pad, relu, dw, db, wants_dx)
    return dw / 2, db / 2, dx


@cases
@pytest.mark.parametrize("N", [1, 5, 40])
@pytest.mark.parametrize("relu", [True, False])
def test_convolution(H: int, W: int, C: int, F: int, pad: int, N: int, relu: bool) -> None:
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((N, H, W, C), (3, 3, C, F), (F,)))
    x.flags.writeable = False
    y = cpu.conv_forward(x, w, b, 1, pad, relu)
    exact = [array.astype(np.float64) for array in (x, w, b)]
    assert_close(y, cpu.conv_forward(*exact, 1, pad, relu))

    dy = rng.standard_normal(y.shape).astype(np.float32)
    dy.flags.writeable = False
    # The ReLU's mask is that of the float32 output: near zero, the two may differ in sign.
    expected = backward(exact[0], y.astype(np.float64), dy.astype(np.float64), exact[1], pad, relu, True)
    for found, right in zip(backward(x, y, dy, w, pad, relu, True), expected, strict=True):
        assert_close(found, right)
    dw, db, dx = backward(x, y, dy, w, pad, relu, False)
    assert dx is None
    assert_close(dw, expected[0])
    assert_close(db, expected[1])


# N, H, W, C, F, K, stride, pad: filters and strides of all kinds, on sizes that fill no block and no stride.
ANY = [
    (3, 5, 7, 16, 32, 1, 1, 0),
    (1, 7, 4, 48, 16, 1, 2, 0),
    (5, 3, 3, 16, 48, 1, 2, 1),
    (2, 8, 8, 16, 32, 3, 2, 1),
    (3, 7, 6, 32, 16, 3, 2, 1),
    (1, 9, 5, 16, 16, 3, 3, 2),
    (2, 6, 5, 32, 16, 5, 1, 2),
    (1, 7, 5, 16, 48, 5, 2, 4),
    (3, 2, 2, 32, 16, 3, 1, 1),
    (2, 1, 5, 16, 16, 3, 1, 1),
    (1, 5, 6, 16, 32, 2, 1, 0),
    (2, 4, 3, 48, 16, 2, 3, 1),
    (1, 3, 2, 16, 16, 2, 2, 4),  # windows that see nothing but padding
    (9, 1, 1, 16, 16, 1, 1, 0),
    (2, 1, 1, 16, 16, 1, 3, 0),
    (3, 6, 7, 3, 32, 3, 1, 1),
    (2, 8, 5, 3, 16, 5, 1, 2),
    (1, 5, 5, 4, 48, 3, 2, 1),
    (2, 5, 6, 2, 16, 1, 1, 0),
    (3, 4, 6, 1, 16, 5, 1, 4),
]


@pytest.mark.parametrize("shape", ANY, ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_any_filter_and_stride_is_the_loops(shape: tuple[int, ...], relu: bool) -> None:
    N, H, W, C, F, K, stride, pad = shape
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(size).astype(np.float32) for size in ((N, H, W, C), (K, K, C, F), (F,)))
    x.flags.writeable = False
    y = cpu.conv_forward(x, w, b, stride, pad, relu)
    expected = reference.conv_forward(x, w, b, stride, pad)
    assert_close(y, np.maximum(expected, 0) if relu else expected)

    dy = rng.standard_normal(y.shape).astype(np.float32)
    dx, dw, db = reference.conv_backward(x, w, dy * (y > 0) if relu else dy, stride, pad)
    for wants_dx in (True, False):
        found = backward(x, y, dy, w, pad, relu, wants_dx, stride)
        assert_close(found[0], dw)
        assert_close(found[1], db)
        if wants_dx:
            assert_close(found[2], dx)
        else:
            assert found[2] is None


# H, C, F, K, stride, pad, and who computes it
LAYERS = [
    (32, 3, 16, 3, 1, 1, "direct"),
    (32, 16, 16, 3, 1, 1, "winograd"),
    (32, 16, 32, 3, 2, 1, "direct"),
    (32, 16, 32, 1, 2, 0, "direct"),
    (8, 192, 64, 1, 1, 0, "direct"),
    (8, 16, 32, 5, 1, 2, "direct"),
    (4, 128, 128, 3, 1, 1, "winograd"),
    (2, 128, 128, 3, 1, 1, "direct"),
    (28, 1, 16, 3, 1, 1, "thin"),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_layers_of_networks_are_compiled_and_their_gradients_are_adjoint(layer: tuple) -> None:
    H, C, F, K, stride, pad, road = layer
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(size).astype(np.float32) for size in ((5, H, H, C), (K, K, C, F)))
    found = cpu._fast_road(x, w, stride, pad)
    assert found is not None and found.__name__.endswith(road)
    y = cpu.conv_forward(x, w, np.zeros(F, np.float32), stride, pad, False)
    dy = rng.standard_normal(y.shape).astype(np.float32)
    dw, _, dx = backward(x, y, dy, w, pad, False, True, stride)
    product = np.vdot(y.astype(np.float64), dy)
    error = TOLERANCE * np.linalg.norm(y) * np.linalg.norm(dy)
    assert abs(np.vdot(x.astype(np.float64), dx) - product) <= error
    assert abs(np.vdot(w.astype(np.float64), dw) - product) <= error


kinds = pytest.mark.parametrize(
    ("C", "K", "stride"), [(32, 3, 1), (32, 3, 2), (32, 1, 1), (16, 5, 1), (3, 3, 1)]
)  # Winograd's, and four that are computed directly


@kinds
def test_no_images_give_no_output_and_no_gradient(C: int, K: int, stride: int) -> None:
    x, w = np.empty((0, 8, 8, C), np.float32), np.ones((K, K, C, 16), np.float32)
    y = cpu.conv_forward(x, w, np.ones(16, np.float32), stride, K // 2, True)
    assert y.shape == (0, 8 // stride, 8 // stride, 16)
    dw, db, dx = backward(x, y, y, w, K // 2, True, C == 32, stride)
    assert not dw.any() and not db.any()
    assert dx is None or dx.shape == x.shape


@kinds
def test_a_slice_of_a_batch_and_what_is_not_contiguous(C: int, K: int, stride: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 9, 8, C)).astype(np.float32)[::2, :, ::-1]
    w, b = rng.standard_normal((K, K, C, 16)).astype(np.float32), np.zeros(16, np.float32)
    y = cpu.conv_forward(x, w, b, stride, K // 2, True)
    np.testing.assert_array_equal(y, cpu.conv_forward(x.copy(), w, b, stride, K // 2, True))
    dy = rng.standard_normal(y.T.shape).astype(np.float32).T
    for one, other in zip(
        backward(x, y, dy, w, K // 2, True, C == 32, stride),
        backward(x.copy(), y, dy.copy(), w, K // 2, True, C == 32, stride),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@kinds
def test_an_image_has_the_same_output_and_dx_in_any_batch(C: int, K: int, stride: int) -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(size).astype(np.float32) for size in ((30, 14, 14, C), (K, K, C, 32)))
    b = np.ones(32, np.float32)

    def output_and_dx(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y = cpu.conv_forward(images, w, b, stride, K // 2, True)
        dx = backward(images, y, y, w, K // 2, True, True, stride)[2] if C % 16 == 0 else images
        return y, dx

    alone = [output_and_dx(x[n : n + 1]) for n in range(30)]
    for together, one_by_one in zip(output_and_dx(x), zip(*alone, strict=True), strict=True):
        np.testing.assert_array_equal(together, np.concatenate(one_by_one))


@pytest.mark.parametrize(("C", "K", "stride"), [(1, 3, 1), (16, 3, 1), (3, 3, 1), (16, 1, 2)])
def test_what_is_not_a_number_shows(C: int, K: int, stride: int) -> None:
    x, w = np.full((1, 4, 4, C), np.nan, np.float32), np.ones((K, K, C, 16), np.float32)
    y = cpu.conv_forward(x, w, np.zeros(16, np.float32), stride, K // 2, True)
    assert np.isnan(y).all()
    dw, db, _ = backward(np.ones_like(x), np.ones_like(y), y, w, K // 2, True, False, stride)
    assert np.isnan(dw).all()
    assert np.isnan(db).all()


@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (3, 1, 1), (3, 2, 0), (2, 3, 1), (5, 1, 4), (1, 2, 0)])
@pytest.mark.parametrize("shape", [(1, 5, 5, 16), (3, 28, 28, 16), (2, 7, 5, 32), (4, 16, 6, 64), (0, 8, 8, 16)])
def test_pooling_is_that_of_numpy(shape: tuple[int, ...], window: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-1, 2, shape).astype(np.float32)  # many equal elements
    y, winner = cpu.max_pool_forward(x, *window)
    expected, right = cpu.max_pool_forward(x.astype(np.float64), *window)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(winner, right)
    assert (y.dtype, winner.dtype) == (np.float32, np.uint8)
    dy = rng.standard_normal(y.shape).astype(np.float32)
    dx = cpu.max_pool_backward(dy, winner, *window, shape)
    wanted = cpu.max_pool_backward(dy.astype(np.float64), winner, *window, shape)
    np.testing.assert_allclose(dx, wanted, rtol=1e-6, atol=1e-6)  # a pixel that won several windows has a sum
    assert dx.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (2, 1, 1)])
def test_what_is_not_a_number_gets_lost_in_no_pool(window: tuple[int, int, int], dtype: type) -> None:
    for place in np.ndindex(4, 4):
        x = np.random.default_rng(0).standard_normal((1, 4, 4, 16)).astype(dtype)
        x[0, place[0], place[1]] = np.nan
        y, winner = cpu.max_pool_forward(x, *window)
        expected = reference.max_pool_forward(x, *window)
        np.testing.assert_array_equal(y, expected)
        dx = cpu.max_pool_backward(np.ones_like(y), winner, *window, x.shape)
        assert (dx[0, place[0], place[1]] == np.isnan(expected[0, ..., 0]).sum()).all()  # it won each of these


def test_what_is_not_a_number_gets_lost_in_no_pool_behind_a_convolution() -> None:
    x, w = np.zeros((1, 16, 16, 16), np.float32), np.zeros((3, 3, 16, 16), np.float32)
    x[0, 6, 6, 0] = np.nan  # all windows of a convolution around it, from (5, 5) to (7, 7)
    y, _ = cpu.conv_pool_forward(x, w, np.zeros(16, np.float32), 1, 1, True)
    assert np.isnan(y[0, 2:4, 2:4]).all()


@pytest.mark.parametrize(("H", "W", "C", "F", "pad"), [*NETWORK, *ODD, *REFUSED, (7, 13, 32, 16, 2), (6, 5, 16, 16, 1)])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("draw", [sparse, lambda rng, shape: rng.standard_normal(shape).astype(np.float32)])
def test_a_convolution_with_its_pool_gives_the_bits_of_one_after_the_other(
    H: int, W: int, C: int, F: int, pad: int, relu: bool, draw: Callable[..., np.ndarray]
) -> None:
    rng = np.random.default_rng(0)
    x, w = draw(rng, (40, H, W, C)), rng.standard_normal((3, 3, C, F)).astype(np.float32)
    x[3, H // 2, W // 2, 0] = np.nan
    b = rng.integers(-1, 2, F).astype(np.float32)
    between = cpu.conv_forward(x, w, b, 1, pad, relu)
    expected, right = cpu.max_pool_forward(between, 2, 2, 0)
    if relu:
        right[expected <= 0] = SHUT
    y, winner = cpu.conv_pool_forward(x, w, b, 1, pad, relu)
    np.testing.assert_array_equal(y, expected, strict=True)
    np.testing.assert_array_equal(winner, right, strict=True)

    x[3, H // 2, W // 2, 0] = 0  # else no gradient would be a number
    dy = rng.standard_normal(y.shape).astype(np.float32)
    d_between = cpu.max_pool_backward(dy, winner, 2, 2, 0, between.shape)
    for wants_dx in (True, False):
        gradients = [np.ones_like(w), np.ones_like(b), np.ones_like(w), np.ones_like(b)]
        dx = cpu.conv_backward(x, d_between, d_between, w, 1, pad, False, *gradients[:2], wants_dx)
        found = cpu.conv_pool_backward(x, winner, dy, w, 1, pad, relu, *gradients[2:], wants_dx)
        assert (found is None) == (not wants_dx)
        for one, other in zip([found, *gradients[2:]], [dx, *gradients[:2]], strict=True):
            np.testing.assert_array_equal(one, other)


def test_imports_and_help_compile_nothing() -> None:
    code = (
        "import sys, distconv, distconv.train\n"
        "try: distconv.train.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('numba' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


FOR = """
import sys, numba, pytest
numba.njit(lambda: None)()  # from here on Numba compiles for this machine, as it must: the code will run here
numba.config.CPU_FEATURES = {features!r}
from distconv.kernels.cpu import products, vector
assert (vector.LANES, products.ROWS) == {layout}
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", {here!r}, "-k", "convolution and True-5 or loops or pool"]))
"""


@pytest.mark.slow
def test_the_layout_for_another_kind_of_processor_is_right_too(tmp_path: Path) -> None:
    features, layout = ("+avx512f", (16, 8)) if LANES == 8 else ("-avx512f", (8, 4))
    code = FOR.format(features=features, layout=layout, here=__file__)
    # A cache of its own: this is the one case in which LANES does not follow from what Numba compiles for.
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


BITS = """
import hashlib, sys
import numpy as np
from distconv.kernels.cpu import arithmetic as cpu
from distconv.kernels.cpu.device import Cpu
from distconv.kernels.cpu.vector import LANES
rng, bits = np.random.default_rng(0), hashlib.sha256()
for N, H, W, C, F, K, stride, pad in {shapes}:
    x, w, b = (rng.standard_normal(size).astype(np.float32) for size in ((N, H, W, C), (K, K, C, F), (F,)))
    dw, db, fast = np.ones_like(w), np.ones_like(b), C % 16 == 0
    y = cpu.conv_forward(x, w, b, stride, pad, True)
    dx = cpu.conv_backward(x, y, rng.standard_normal(y.shape).astype(np.float32), w, stride, pad, True, dw, db, fast)
    for array in (y, dw, db) + (dx,) * fast:
        bits.update(array.tobytes())
    if stride == 1:
        y, winner = cpu.conv_pool_forward(x, w, b, 1, pad, True)
        dx = cpu.conv_pool_backward(x, winner, np.ones_like(y), w, 1, pad, True, dw, db, fast)
        for array in (y, winner, dw, db) + (dx,) * fast:
            bits.update(array.tobytes())
        y, mean, variance, backward = Cpu().conv_norm(x, w, b, b, 1e-5, 1, pad, True)
        dx, _ = backward(np.ones_like(y), dw, db, db, fast, None)
        for array in (y, mean, variance, dw, db) + (dx,) * fast:
            bits.update(array.tobytes())
print(LANES, bits.hexdigest())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names a processor of x86")
def test_convolutions_have_the_same_bits_with_shorter_vectors() -> None:
    rounds = (37, 13, 14, 16, 48, 3, 1, 1), (18, 12, 6, 64, 32, 3, 1, 1), (3, 9, 8, 1, 48, 3, 1, 1)
    code = BITS.format(shapes=[*ANY, *rounds])
    features = ",".join(f"+{name}" for name in ("avx", "avx2", "fma", "f16c", "sse4.2", "bmi", "bmi2"))
    told = []
    for other in ({}, {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}):
        result = subprocess.run([sys.executable, "-c", code], env=os.environ | other, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        told.append(result.stdout.split())
    assert told[0][1] == told[1][1]
    assert told[0][0] == str(LANES) and told[1][0] == "8"


def test_the_layout_is_that_of_the_processor_that_numba_compiles_for() -> None:
    code = "from distconv.kernels.cpu.vector import LANES; print(LANES)"
    for features, lanes in (("+avx512f,+avx2", "16"), ("-avx512f,+avx2", "8"), ("", "8")):
        environment = {**os.environ, "NUMBA_CPU_FEATURES": features, "NUMBA_CPU_NAME": "generic"}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.stdout.strip() == lanes, result.stderr


@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize("relu", [True, False])
def test_a_window_of_zeros_gives_the_bias_to_the_bit(pad: int, relu: bool) -> None:
    rng = np.random.default_rng(0)
    x = sparse(rng, (60, 13, 11, 16))
    w, b = rng.standard_normal((3, 3, 16, 32)).astype(np.float32), rng.standard_normal(32).astype(np.float32)
    b[::2] = 0
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    still = ~windows.any(axis=(3, 4, 5))
    y = cpu.conv_forward(x, w, b, 1, pad, relu)
    assert still.any() and not still.all()
    np.testing.assert_array_equal(y[still], np.broadcast_to(np.maximum(b, 0) if relu else b, y[still].shape))


LAYOUTS = {
    "rows": lambda x: np.ascontiguousarray(x),
    "columns": lambda x: np.asfortranarray(x),
    "every other": lambda x: np.repeat(np.repeat(x, 2, axis=0), 3, axis=1)[::2, ::3],
}


@pytest.mark.parametrize("of_a", LAYOUTS)
@pytest.mark.parametrize("of_b", LAYOUTS)
def test_a_product_in_order_is_the_product_and_a_row_hangs_on_no_other(of_a: str, of_b: str) -> None:
    rng = np.random.default_rng(0)
    for M, K, N in ((13, 1024, 50), (1024, 13, 10), (8, 50, 16), (1, 1, 1), (7, 3, 17), (0, 5, 3), (5, 0, 3)):
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((M, K), (K, N)))
        a, b = LAYOUTS[of_a](a), LAYOUTS[of_b](b)
        found = matmul(a, b)
        assert found.shape == (M, N) and found.dtype == np.float32
        exact = a.astype(np.float64) @ b.astype(np.float64)
        assert np.linalg.norm(found - exact) <= 1e-6 * np.linalg.norm(a) * np.linalg.norm(b)
        for rows in (slice(0, M // 2), slice(M // 2, M)):
            np.testing.assert_array_equal(matmul(a[rows], b), found[rows])
        np.testing.assert_array_equal(matmul(a, b[:, : N // 2]), found[:, : N // 2])
