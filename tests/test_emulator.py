"""The emulator: threads, barriers and tile products as on a GPU; mistakes that a GPU would not report raise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.emulator import Emulator, available

pytestmark = pytest.mark.skipif(not available(), reason="kernels are emulated with g++ on Linux")

SOURCE = r"""
#define ROOM 64
extern "C" __global__ void indices(int *seen) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    seen[block * blockDim.x + threadIdx.x] += block * 1000 + threadIdx.x + 1;
}

// The sum of the first `count` numbers of each block; /* the other threads */ leave early.
extern "C" __global__ void __launch_bounds__((2 * (ROOM) + ROOM), 1) sums(
    const float *__restrict__ x,
    float *__restrict__ y, int count
) {
    __shared__ float part[2 * ROOM];
    const int thread = threadIdx.x;
    if (thread >= count) return;
    part[thread] = x[blockIdx.x * blockDim.x + thread];
    __syncthreads();
    for (int left = count; left > 1;) {
        const int half = (left + 1) / 2;
        if (thread < left - half) part[thread] += part[thread + half];
        __syncthreads();
        left = half;
    }
    if (thread == 0) y[blockIdx.x] = part[0];
}

template <int FIRST> __device__ __forceinline__ float of_neighbour(float value) {
    __shared__ float all[32];
    all[threadIdx.x] = value;
    if (FIRST) __syncwarp();
    return all[(threadIdx.x + 1) % 32];
}
extern "C" __global__ void neighbours(float *y) { y[threadIdx.x] = of_neighbour<1>(threadIdx.x); }
extern "C" __global__ void race(float *y) { y[blockIdx.x * 32 + threadIdx.x] = of_neighbour<0>(threadIdx.x); }

extern "C" __global__ void copy(const float *x, float *y, int from) {
    const int i = from + int(threadIdx.x);
    y[i] = x[i];
}
extern "C" __global__ void triple(float *x, float by) { x[threadIdx.x] *= by; }
extern "C" __global__ void add_one(void *x, int at) { ++((unsigned short *)x)[at]; }
extern "C" __global__ void outside_shared(float *y, unsigned at) {
    __shared__ float few[8];
    few[at] = 1;
    y[0] = few[at];
}
extern "C" __global__ void four_at(float *y, int at) { *(float4 *)(y + at) = make_float4(1, 2, 3, 4); }
extern "C" __global__ void divide(float *y, int by) { y[0] = 7 / by; }
extern "C" __global__ void two_barriers(float *y) {
    if (threadIdx.x == 3) __syncwarp(); else __syncthreads();
    y[threadIdx.x] = 1;
}
extern "C" __global__ void half_a_warp(float *y) {
    const float a[4] = {}, b[2] = {};
    float c[4] = {};
    if (threadIdx.x < 16) multiply_tile_tf32(c, a, b);
    y[threadIdx.x] = c[0];
}

extern "C" __global__ void to_half(const float *x, unsigned short *y) {
    y[blockIdx.x * 256 + threadIdx.x] = half_bits(x[blockIdx.x * 256 + threadIdx.x]);
}
extern "C" __global__ void from_half(const unsigned short *x, float *y) {
    y[blockIdx.x * 256 + threadIdx.x] = half_value(x[blockIdx.x * 256 + threadIdx.x]);
}

#ifndef KIND
#define KIND 0
#endif
// Each warp multiplies its own tiles, twice: C += A B, then once more. A is 16 x DEPTH, B DEPTH x 8.
extern "C" __global__ void products(const float *a, const float *b, float *c) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, DEPTH = KIND ? 16 : 8;
    a += warp * 16 * DEPTH, b += warp * DEPTH * 8, c += warp * 128;
    float of_a[4], lower[4], of_b[4], of_c[4];
    for (int i = 0; i < 4; ++i) {
        of_c[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
        if (KIND) {
            of_a[i] = a[g * 16 + 4 * t + i], lower[i] = a[(g + 8) * 16 + 4 * t + i], of_b[i] = b[(4 * t + i) * 8 + g];
        } else {
            of_a[i] = to_tf32(a[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)]);
            if (i < 2) of_b[i] = to_tf32(b[(t + 4 * i) * 8 + g]);
        }
    }
    for (int times = 0; times < 2; ++times) {
        if (KIND == 0) multiply_tile_tf32(of_c, of_a, of_b);
        if (KIND == 1) multiply_tile_float16(of_c, of_a, lower, of_b);
        if (KIND == 2) multiply_tile_bfloat16(of_c, of_a, lower, of_b);
    }
    for (int i = 0; i < 4; ++i) c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = of_c[i];
}
"""


@pytest.fixture
def device() -> Emulator:
    return Emulator()


def run(device: Emulator, name: str, blocks: int, threads: int, *arguments: Any) -> None:
    device.function(SOURCE, name)((blocks, 1, 1), threads, *arguments)


def test_every_thread_of_every_block_runs_once_with_its_indices(device: Emulator) -> None:
    seen = device.zeros((24, 70), np.int32)
    device.function(SOURCE, "indices")((2, 3, 4), 70, seen)
    expected = np.arange(24)[:, None] * 1000 + np.arange(70) + 1
    np.testing.assert_array_equal(device.download(seen), expected)


@pytest.mark.parametrize("count", [1, 31, 77, 128])
def test_sums_through_shared_memory_where_some_threads_return_early(device: Emulator, count: int) -> None:
    x = np.arange(5 * 128, dtype=np.float32).reshape(5, 128)
    y = device.empty(5, np.float32)
    run(device, "sums", 5, 128, device.upload(x), y, np.int32(count))
    np.testing.assert_array_equal(y, x[:, :count].sum(axis=1))


def test_a_missing_barrier_shows(device: Emulator) -> None:
    y = device.empty((2, 32), np.float32)
    run(device, "neighbours", 1, 32, y[0])
    np.testing.assert_array_equal(y[0], (np.arange(32) + 1) % 32)
    run(device, "race", 2, 32, y)
    assert np.isnan(y).any(axis=1).all()  # shared memory is poisoned before each block


def test_what_was_not_written_shows(device: Emulator) -> None:
    assert np.isnan(device.empty((3, 2), np.float32)).all()
    assert (device.empty(3, np.uint16) == 0xFFFF).all()
    assert (device.empty(3, np.int32) == -1).all()
    assert not device.zeros(3, np.float64).any()
    assert not device.pinned(5).any()


@pytest.mark.parametrize(("start", "side"), [(-1, "before its start"), (1, "after its end"), (40, "after its end")])
def test_a_write_outside_an_array_raises(device: Emulator, start: int, side: str) -> None:
    x, y = device.zeros(32, np.float32), device.zeros((2, 16), np.float32)
    with pytest.raises(AssertionError, match=f"copy wrote outside y, {side}"):
        run(device, "copy", 1, 32, x, y[0], np.int32(start))
    run(device, "copy", 1, 32, x, y, np.int32(0))  # the damage was repaired


def test_a_read_outside_an_array_poisons(device: Emulator) -> None:
    x, y = device.zeros(31, np.float32), device.zeros(32, np.float32)
    run(device, "copy", 1, 32, x, y, np.int32(0))
    assert np.isnan(y[31])


def test_arithmetic_in_place_outside_an_array_raises(device: Emulator) -> None:
    with pytest.raises(AssertionError, match="triple wrote outside x, after its end"):
        run(device, "triple", 1, 33, device.zeros(32, np.float32), np.float32(3))


@pytest.mark.parametrize(
    ("name", "threads", "arguments", "reason"),
    [
        ("outside_shared", 1, (np.uint32(8),), "index outside a shared or local array, thread 0 of"),
        ("four_at", 1, (np.int32(2),), "misaligned address"),
        ("four_at", 1, (np.int32(2**30),), "access far outside any array"),
        ("divide", 1, (np.int32(0),), "integer division by zero"),
        ("two_barriers", 64, (), "some threads wait at __syncthreads, others"),
        ("half_a_warp", 32, (), "without all 32 threads"),
        ("half_a_warp", 16, (), "without all 32 threads"),
    ],
)
def test_what_a_gpu_leaves_undefined_raises(
    device: Emulator, name: str, threads: int, arguments: tuple[Any, ...], reason: str
) -> None:
    y = device.zeros(64, np.float32)
    for _ in range(2):
        with pytest.raises(AssertionError, match=f"{name}: .*{reason}"):
            run(device, name, 1, threads, y, *arguments)


X, COUNT = np.zeros(128, np.float32), np.int32(1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, y: (x, y), "takes 3 arguments, got 2"),
        (lambda x, y: (x, y, COUNT, COUNT), "takes 3 arguments, got 4"),
        (lambda x, y: (x, y, 1), "count must be a NumPy scalar of int32, not int"),
        (lambda x, y: (x, y, np.int64(1)), "count must be a NumPy scalar of int32, not int64"),
        (lambda x, y: (x, y, y), "count must be a NumPy scalar of int32, not ndarray"),
        (lambda x, y: (COUNT, y, COUNT), "x must be an array of float32, not int32"),
        (lambda x, y: (x.view(np.int32), y, COUNT), "x must be an array of float32, not int32"),
        (lambda x, y: (x[::2], y, COUNT), "x must be an array of float32, contiguous"),
        (lambda x, y: (X, y, COUNT), "x must be an array of float32 on the device"),
        (lambda x, y: (Emulator().pinned(512).view(np.float32), y, COUNT), "x must be .* on the device"),
    ],
)
def test_a_wrong_argument_raises(device: Emulator, change: Callable[..., tuple[Any, ...]], reason: str) -> None:
    with pytest.raises(TypeError, match=f"sums.*{reason}"):
        run(device, "sums", 1, 128, *change(device.upload(X), device.upload(X)))


def test_a_void_pointer_takes_an_array_of_any_type(device: Emulator) -> None:
    x = device.upload(np.array([2, 3], np.uint16))
    run(device, "add_one", 1, 1, x, np.int32(1))
    assert x.tolist() == [2, 4]
    with pytest.raises(TypeError, match="x must be an array of any type, not int32"):
        run(device, "add_one", 1, 1, COUNT, COUNT)


@pytest.mark.parametrize(("grid", "threads"), [((1, 1, 1), 193), ((0, 1, 1), 64), ((1, 70000, 1), 64), ((1, 1, 1), 0)])
def test_a_launch_that_a_gpu_refuses_raises(device: Emulator, grid: tuple[int, int, int], threads: int) -> None:
    with pytest.raises(ValueError, match="cannot launch"):
        device.function(SOURCE, "sums")(grid, threads, device.upload(X), device.upload(X), COUNT)


def test_mistakes_in_the_source_raise(device: Emulator) -> None:
    with pytest.raises(ValueError, match="no kernel 'sum' in the source"):
        device.function(SOURCE, "sum")
    with pytest.raises(ValueError, match="cannot tell the type"):
        device.function('extern "C" __global__ void f(bool *x) {}', "f")
    with pytest.raises(ValueError, match="not every __global__"):
        device.function("__global__ void f(int *x) {}", "f")
    with pytest.raises(RuntimeError, match="nothing_by_this_name"):
        device.function('extern "C" __global__ void f(int *x) { *x = nothing_by_this_name; }', "f")


def test_copies_between_device_and_pinned_memory(device: Emulator) -> None:
    there, pinned, back = device.upload(np.arange(6).reshape(2, 3)), device.pinned(48), device.empty(6, np.int64)
    device.copy(pinned, there)
    device.copy(back[:3].view(np.float64), pinned[24:])
    assert device.download(back).tolist() == [3, 4, 5, -1, -1, -1]
    with pytest.raises(ValueError, match="48 bytes to 24"):
        device.copy(back[:3], pinned)
    for wrong in (there.T, np.zeros(6)):
        with pytest.raises(TypeError, match="contiguous arrays, on the device or pinned"):
            device.copy(pinned, wrong)


def test_processes_can_share_what_was_compiled(tmp_path: Path) -> None:
    source = 'extern "C" __global__ void f(int *x) { *x = VALUE; }'
    for value in (5, 6):
        x = Emulator(tmp_path).zeros((), np.int32)
        Emulator(tmp_path).function(source, "f", (("VALUE", value),))((1, 1, 1), 1, x)
        assert x == value
    assert len(list(tmp_path.iterdir())) == 2


def same(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> bool:
    """Bit for bit, but any NaN for a NaN."""
    bits = np.uint16 if found.dtype == np.float16 else np.uint32
    both = np.isnan(found) & np.isnan(expected)
    return bool((both | (found.view(bits) == expected.view(bits))).all())


def test_every_half_becomes_its_value(device: Emulator) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    values = device.empty(65536, np.float32)
    run(device, "from_half", 256, 256, device.upload(bits), values)
    assert same(values, bits.view(np.float16).astype(np.float32))


def test_floats_become_the_nearest_halves(device: Emulator) -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    ties = ((halves + np.append(halves[1:], 65536)) / 2).astype(np.float32)  # all of them, overflow included
    around = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))])
    anything = np.random.default_rng(1).integers(0, 2**32, 2**17, dtype=np.uint32).view(np.float32)
    near = np.random.default_rng(2).standard_normal(2**16).astype(np.float32)
    special = np.array([0.0, np.inf, np.nan, 1e-45, 2**-24, 2**-25, 3e38], np.float32)
    x = np.concatenate([around, anything, near, special])
    x = np.concatenate([x, -x])
    x = np.resize(x, -(-x.size // 256) * 256)
    bits = device.empty(x.size, np.uint16)
    run(device, "to_half", x.size // 256, 256, device.upload(x), bits)
    with np.errstate(all="ignore"):
        assert same(device.download(bits).view(np.float16), x.astype(np.float16))


def to_tf32(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """11 significant bits, half away from zero."""
    fraction, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.trunc(fraction * 2**11 + np.copysign(0.5, x)) / 2**11, exponent).astype(np.float32)


def to_float16(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return x.astype(np.float16).astype(np.float32)


def to_bfloat16(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """8 significant bits, half to even."""
    fraction, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.rint(fraction * 2**8) / 2**8, exponent).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "rounded", "tie"), [(0, to_tf32, 0x1000), (1, to_float16, 0x1000), (2, to_bfloat16, 0x8000)]
)
def test_tile_products(
    device: Emulator, kind: int, rounded: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], tie: int
) -> None:
    warps, rng = 3, np.random.default_rng(kind)

    def some(*shape: int) -> np.ndarray[Any, Any]:
        """Random numbers, every other one a tie between two neighbours of the kind."""
        x = rng.standard_normal(shape).astype(np.float32)
        bits = x.reshape(-1).view(np.uint32)
        bits[::2] = bits[::2] & ~np.uint32(2 * tie - 1) | tie
        return x

    depth = 16 if kind else 8
    a, b, c = some(warps, 16, depth), some(warps, depth, 8), some(warps, 16, 8)
    found = device.upload(c)
    products = device.function(SOURCE, "products", (("KIND", kind),))
    products((1, 1, 1), 32 * warps, device.upload(a), device.upload(b), found)
    expected = c
    for k in (*range(depth), *range(depth)):
        expected = expected + rounded(a)[:, :, k, None] * rounded(b)[:, None, k, :]
    np.testing.assert_array_equal(found, expected)
