"""The kernels of the float16 wire on a GPU, emulated or real (`pytest -m gpu`), against the CPU's messages and sums."""

from __future__ import annotations

import numpy as np
import pytest

from distconv.comm.wire import WIRES
from distconv.kernels.gpu.arithmetic import Gpu
from distconv.kernels.interface import BLOCK, FINITE
from tests.gpu import Array, bits, random

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
