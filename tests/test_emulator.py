"""The emulator: mistakes that a GPU would not report raise, or poison what comes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.emulator import Emulator, available

pytestmark = pytest.mark.skipif(not available(), reason="kernels are emulated with g++ on Linux")

SOURCE = r"""
template <int BARRIER> __device__ __forceinline__ float of_neighbour(float value) {
    __shared__ float all[32];
    all[threadIdx.x] = value;
    if (BARRIER) __syncwarp();
    return all[(threadIdx.x + 1) % 32];
}
extern "C" __global__ void neighbours(float *y) { y[threadIdx.x] = of_neighbour<1>(threadIdx.x); }
extern "C" __global__ void race(float *y) { y[blockIdx.x * 32 + threadIdx.x] = of_neighbour<0>(threadIdx.x); }

extern "C" __global__ void copy(const float *x, float *y, int from) {
    const int i = from + int(threadIdx.x);
    y[i] = x[i];
}
extern "C" __global__ void outside_shared(float *y, int at) {
    __shared__ float few[8];
    few[unsigned(at)] = 1;
    y[0] = few[unsigned(at)];
}
extern "C" __global__ void four_at(float *y, int at) { *(float4 *)(y + at) = make_float4(1, 2, 3, 4); }
extern "C" __global__ void divide(float *y, int by) { y[0] = 7 / by; }
extern "C" __global__ void two_barriers(float *y, int at) {
    if (threadIdx.x == at) __syncwarp(); else __syncthreads();
    y[threadIdx.x] = 1;
}
extern "C" __global__ void half_a_warp(float *y, int first) {
    const float a[4] = {}, b[2] = {};
    float c[4] = {};
    if (threadIdx.x < first) multiply_tile_tf32(c, a, b);
    y[threadIdx.x] = c[0];
}
"""


@pytest.fixture
def device() -> Emulator:
    return Emulator()


def run(device: Emulator, name: str, blocks: int, threads: int, *arguments: Any) -> None:
    device.function(SOURCE, name)((blocks, 1, 1), threads, *arguments)


def test_a_missing_barrier_shows(device: Emulator) -> None:
    y = device.empty((2, 32), np.float32)
    run(device, "neighbours", 1, 32, y[0])
    np.testing.assert_array_equal(y[0], (np.arange(32) + 1) % 32)
    run(device, "race", 2, 32, y)
    assert np.isnan(y).any(axis=1).all()  # shared memory is poisoned before each block


@pytest.mark.parametrize(("start", "side"), [(-1, "before its start"), (1, "after its end"), (40, "after its end")])
def test_a_write_outside_an_array_raises(device: Emulator, start: int, side: str) -> None:
    x, y = device.zeros(32, np.float32), device.zeros((2, 16), np.float32)
    with pytest.raises(AssertionError, match=f"copy wrote outside y, {side}"):
        run(device, "copy", 1, 32, x, y[0], np.int32(start))
    run(device, "copy", 1, 32, x, y, np.int32(0))  # the damage was repaired


def test_a_read_outside_an_array_or_of_what_was_not_written_poisons(device: Emulator) -> None:
    x, y = device.zeros(31, np.float32), device.empty(40, np.float32)
    run(device, "copy", 1, 32, x, y, np.int32(0))
    assert np.isnan(y[31:]).all() and not y[:31].any()


@pytest.mark.parametrize(
    ("name", "threads", "argument", "reason"),
    [
        ("outside_shared", 1, 8, "index outside a shared or local array, thread 0 of"),
        ("four_at", 1, 2, "misaligned address"),
        ("four_at", 1, 2**30, "access far outside any array"),
        ("divide", 1, 0, "integer division by zero"),
        ("two_barriers", 64, 3, "some threads wait at __syncthreads, others"),
        ("half_a_warp", 32, 16, "without all 32 threads"),
    ],
)
def test_what_a_gpu_leaves_undefined_raises(
    device: Emulator, name: str, threads: int, argument: int, reason: str
) -> None:
    y = device.zeros(64, np.float32)
    with pytest.raises(AssertionError, match=f"{name}: .*{reason}"):
        run(device, name, 1, threads, y, np.int32(argument))


def test_a_wrong_argument_raises(device: Emulator) -> None:
    x, y, first = device.zeros(32, np.float32), device.zeros(32, np.float32), np.int32(0)
    for wrong in ((x, y), (x, y, 0), (x, y, np.int64(0)), (x.view(np.int32), y, first), (np.zeros(32, "f4"), y, first)):
        with pytest.raises(TypeError, match="copy"):
            run(device, "copy", 1, 32, *wrong)


def test_kernels_take_pinned_memory_only_where_it_is_mapped(device: Emulator) -> None:
    pinned, x = device.pinned(4 * 32).view(np.float32), device.upload(np.arange(32, dtype=np.float32))
    with pytest.raises(TypeError, match="on the device, not in host memory"):
        run(device, "copy", 1, 32, x, pinned, np.int32(0))
    run(device, "copy", 1, 32, x, device.mapped(pinned), np.int32(0))
    assert pinned.tolist() == list(range(32))
    with pytest.raises(AssertionError, match="copy wrote outside y, after its end"):
        run(device, "copy", 1, 32, x, device.mapped(pinned), np.int32(1))
    for wrong in (x, np.zeros(32, np.float32), pinned[::2]):
        with pytest.raises(TypeError, match="only contiguous pinned memory"):
            device.mapped(wrong)


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
