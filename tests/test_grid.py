"""Sums in whole numbers: the same bits in any order, and near the exact sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distconv.comm.exact import EXACT_WIRES, ExactWire
from distconv.kernels import grid
from distconv.kernels.interface import BLOCK

WIRES = pytest.mark.parametrize("bits", [16, 32])


def summed(vectors: np.ndarray, bits: int, groups: list[list[int]] | None = None) -> np.ndarray:
    """What ranks that hold these groups of the vectors (V, n) get, all of them in one process."""
    V, n = vectors.shape
    share, blocks = grid.factor(V, bits), -(-n // BLOCK)
    groups = groups or [list(range(V))]
    peaks = [np.empty(blocks, np.uint16) for _ in groups]
    for group, found in zip(groups, peaks, strict=True):
        grid.peaks(vectors[group], found)
    largest, total = np.max(peaks, axis=0), np.zeros(n, f"int{bits}")
    for group in groups:
        part = np.empty_like(total)
        grid.round_and_sum(vectors[group], largest, share, part)
        total += part  # wraps around without a word, where the steps are too small
    arrived = np.empty(n, np.float32)
    grid.widen(total, largest, share, arrived)
    return arrived


def steps(vectors: np.ndarray, bits: int) -> np.ndarray:
    """The distance between neighbours on the grid, at each number; an upper bound."""
    V, n = vectors.shape
    peaks = [np.abs(vectors[:, start : start + BLOCK]).max(initial=0) for start in range(0, n, BLOCK)]
    top = 2.0 ** (bits - 1) - 1 - 2 * V - (2**12 if bits == 32 else 0)
    return np.repeat(np.maximum(np.float64(peaks) * (1 + 2**-7) * V / top, 2.0**-126), BLOCK)[:n]


@WIRES
@given(data=st.data())
def test_any_dealing_out_gives_the_same_bits_within_half_a_step_a_vector(bits: int, data: Any) -> None:
    V, n = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 3 * BLOCK + 7))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** rng.integers(-44, 35, -(-n // BLOCK)).astype(np.float64)
    vectors = (rng.standard_normal((V, n)) * np.repeat(scale, BLOCK)[:n]).astype(np.float32)
    places = rng.integers(0, data.draw(st.integers(1, V)), V)
    groups = [[v for v in rng.permutation(V) if places[v] == place] for place in set(places.tolist())]
    found = summed(vectors, bits)
    assert found.tobytes() == summed(vectors, bits, groups).tobytes()
    exact = vectors.astype(np.float64).sum(axis=0)
    rounding = 2.0**-22 * np.abs(vectors.astype(np.float64)).sum(axis=0)  # of float32 itself
    assert (np.abs(found - exact) <= V * steps(vectors, bits) / 2 + rounding).all()


@WIRES
@pytest.mark.parametrize("V", [1, 2, 3, 5, 7, 8, 100, 1024])
def test_equal_numbers_of_any_size_do_not_overflow(bits: int, V: int) -> None:
    for x in (1.0, 1.9999999, 1.00390625, 1.0039062, -1.0, 3e38 / V, 1e-30, 0.0):
        vectors = np.full((V, BLOCK), x, np.float32)
        step, exact = steps(vectors, bits)[0], V * float(vectors[0, 0])
        assert np.abs(summed(vectors, bits) - exact).max() <= V * step / 2 + 1e-6 * abs(exact)


@WIRES
def test_infinity_and_nan_spoil_their_block_and_no_other(bits: int) -> None:
    for bad in (np.inf, -np.inf, np.nan):
        vectors = np.ones((3, 3 * BLOCK), np.float32)
        vectors[1, BLOCK + 9] = bad
        found = summed(vectors, bits, [[0], [1, 2]])
        assert np.isnan(found[BLOCK : 2 * BLOCK]).all()
        assert np.isfinite(found[:BLOCK]).all() and np.isfinite(found[2 * BLOCK :]).all()


def test_sixteen_bits_are_as_near_as_halves_up_to_eight_vectors_and_32_as_float32() -> None:
    """The closed form: V roundings that are even over a step, against the root mean square of the sum."""
    rng = np.random.default_rng(0)
    for V, bits, most in ((2, 16, 7e-5), (4, 16, 1.5e-4), (8, 16, 3.0e-4), (20, 16, 8e-4), (8, 32, 1e-7)):
        vectors = rng.standard_normal((V, 100 * BLOCK)).astype(np.float32)
        exact = vectors.astype(np.float64).sum(axis=0)
        error = np.linalg.norm(summed(vectors, bits) - exact) / np.linalg.norm(exact)
        assert error <= most
        if bits == 16:
            assert error == pytest.approx(steps(vectors, bits).mean() / np.sqrt(12), rel=0.05)


def test_a_vector_on_its_way_is_rounded_to_the_grid_of_all() -> None:
    x = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    for wire in EXACT_WIRES.values():
        for V in (1, 8):
            of_many = ExactWire(wire.name, wire.dtype, wire.numbers, V)
            alone = np.zeros((V, 1000), np.float32)
            alone[0] = x
            bits = 8 * wire.numbers.dtype.itemsize
            assert of_many.round_trip(x).tobytes() == summed(alone, bits).tobytes()
