"""The int8 wire: what arrives is a whole multiple of the block's scale next to the number, and right in the mean."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from distconv.comm.wire import PIECE, WIRES, random_key
from distconv.kernels.interface import BLOCK

WIRE = WIRES["int8"]
MOST = 126  # steps of the scale, either way
SMALLEST = 2.0**-126  # scale
STEPS = 4000

any_float = st.floats(-(2.0**127), 2.0**127, width=32) | st.sampled_from(
    [0.0, -0.0, 1e-45, -1e-38, 1e38, np.inf, -np.inf, np.nan]
)
vectors = hnp.arrays(np.float32, st.integers(1, 700), elements=any_float, fill=st.nothing() | any_float)


def sent(x: np.ndarray, key: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What arrives of x, and the scale of each number (n,), both float64, in a message with room for more."""
    room = -(-x.size // BLOCK) * BLOCK + BLOCK
    message, arrived = np.full(WIRE.nbytes(room), 0xAA, np.uint8), np.full(x.size, 7, np.float32)
    assert WIRE.encode(x, message, key) == np.isfinite(x).all()
    WIRE.decode(message, arrived)
    upper = message[room:].view(np.uint16)[: room // BLOCK].astype(np.uint32)
    return arrived.astype(np.float64), np.repeat((upper << 16).view(np.float32), BLOCK)[: x.size].astype(np.float64)


def gradient(n: int = 1000) -> np.ndarray:
    random = np.random.default_rng(0)
    return (random.standard_normal(n) * random.lognormal(0, 1, n) * 1e-4).astype(np.float32)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(vectors, st.integers(0, 2**70))
@example(np.float32([1e-45] * 300), 0)
@example(np.float32([3e38, -3e38, 1e-38, np.inf, -np.inf, np.nan, -0.0] * 100), 2**64 - 1)
@example(np.float32([1 - 2**-24, 1, 2 - 2**-23, 2]), 5)
def test_any_float_arrives_as_one_of_its_two_neighbours_on_the_grid_of_its_block(x: np.ndarray, key: int) -> None:
    arrived, scale = sent(x, key)
    finite = np.isfinite(x)
    np.testing.assert_array_equal(arrived[~finite], x[~finite])
    exact = x.astype(np.float64)[finite]
    steps = arrived[finite] / scale[finite]
    np.testing.assert_array_equal(steps, np.rint(steps))
    assert np.all(np.abs(steps) <= MOST)
    assert np.all(np.abs(arrived[finite] - exact) <= scale[finite] * (1 + 1e-6))
    assert np.all(arrived[finite][exact == 0] == 0)
    for start in range(0, x.size, BLOCK):  # no grid is wider than it must be
        peak = np.abs(x[start : start + BLOCK][finite[start : start + BLOCK]]).max(initial=0.0)
        assert scale[start] <= max(float(peak) / MOST * (1 + 2**-7 + 1e-4), SMALLEST)


def test_the_mean_over_steps_is_the_number_and_its_spread_that_of_a_coin() -> None:
    x = gradient()
    total = np.zeros(x.size)
    for step in range(STEPS):
        arrived, scale = sent(x, random_key(0, step, 0, 0))
        total += arrived
    steps = x / scale
    up = steps - np.floor(steps)  # how often it should be rounded up
    error = (total / STEPS / scale - steps) * np.sqrt(STEPS)
    coins = up * (1 - up) * STEPS > 20
    z = error[coins] / np.sqrt(up * (1 - up))[coins]
    assert coins.sum() > 900 and np.abs(z).max() < 5
    assert np.mean(z**2) == pytest.approx(1, abs=5 * np.sqrt(2 / coins.sum()))
    assert abs(z.mean()) < 5 / np.sqrt(coins.sum())


@pytest.mark.parametrize("other", [(1, 7, 2, 256), (0, 8, 2, 256), (0, 7, 3, 256), (0, 7, 2, 512), (0, 10**9, 2, 256)])
def test_another_seed_step_sender_or_place_draws_other_numbers(other: tuple[int, int, int, int]) -> None:
    x = np.tile(gradient(BLOCK), 64)
    (one, scale), (same, _), (another, _) = (
        sent(x, random_key(*key)) for key in ((0, 7, 2, 256), (0, 7, 2, 256), other)
    )
    np.testing.assert_array_equal(one, same)
    errors = (one - x) / scale, (another - x) / scale
    blocks = errors[0].reshape(64, BLOCK)
    for a, b in (errors, (blocks[:-1].ravel(), blocks[1:].ravel())):  # nor do two blocks draw the same
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(a.size)


def test_what_a_number_draws_hangs_on_its_place_and_not_on_the_message_it_is_in() -> None:
    x = gradient(PIECE + 2 * BLOCK + 9)
    whole, _ = sent(x, random_key(3, 5, 1, 0))
    for place in (BLOCK, PIECE, PIECE + BLOCK):
        np.testing.assert_array_equal(sent(x[place:], random_key(3, 5, 1, place))[0], whole[place:])


@pytest.mark.parametrize("n", [BLOCK, 123_648, 1 << 20])
def test_a_message_is_a_quarter_of_float32s(n: int) -> None:
    assert WIRE.nbytes(n) <= 0.26 * WIRES["float32"].nbytes(n)
