"""The wire formats, bit for bit against a model in float64, on any floats."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, example, given, settings

from distconv.comm.wire import PIECE, WIRES, HalfWire, Wire
from distconv.kernels.interface import BLOCK
from tests import reference
from tests.files import peak_memory

PORTABLE = HalfWire("float16", np.dtype(np.float32))
HALF_WIRES = pytest.mark.parametrize("wire", [WIRES["float16"], PORTABLE], ids=["hardware", "portable"])
steady = settings(deadline=None, derandomize=True, max_examples=60)

any_float = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1e-45, -1e-38, 1e38, 65504.0, 65520.0, np.inf, np.nan])
vectors = hnp.arrays(np.float32, st.integers(1, 700), elements=any_float, fill=st.nothing() | any_float)


def through(wire: Wire, x: np.ndarray) -> np.ndarray:
    """What arrives of x, in a message with room for more."""
    message = np.full(wire.nbytes(-(-x.size // BLOCK) * BLOCK + BLOCK), 0xAA, np.uint8)
    arrived = np.full(x.size, 7, x.dtype)
    before = x.copy()
    assert wire.encode(x, message) == np.isfinite(x).all()
    np.testing.assert_array_equal(x.view(np.uint8), before.view(np.uint8))
    wire.decode(message, arrived)
    return arrived


def assert_same_bits(x: np.ndarray, y: np.ndarray) -> None:
    """Equal to the last bit and sign of zero; one NaN is as good as another."""
    np.testing.assert_array_equal(np.where(np.isnan(x), 0, x), np.where(np.isnan(y), 0, y))
    np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
    np.testing.assert_array_equal(np.signbit(x) | np.isnan(x), np.signbit(y) | np.isnan(y))


@HALF_WIRES
@steady
@given(vectors)
@example(np.float32([1e-45] * 300))
@example(np.float32([3.4e38, 1e-38, np.inf, -np.inf, np.nan, -0.0] * 100))
def test_halves_are_those_of_the_model_on_any_floats(wire: Wire, x: np.ndarray) -> None:
    assert_same_bits(through(wire, x), reference.half_wire(x))


@HALF_WIRES
def test_every_pattern_of_the_exponent_and_the_rounding_bits_is_rounded_as_the_model_does(wire: Wire) -> None:
    exponents = np.arange(1, 255, dtype=np.uint32) << 23
    mantissas = np.uint32([0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FF000, 0x7FFFFF])
    for exponent in exponents:
        x = (exponent | mantissas).view(np.float32)
        assert_same_bits(through(wire, x), reference.half_wire(x))


@HALF_WIRES
@steady
@given(vectors)
def test_a_second_passage_changes_nothing(wire: Wire, x: np.ndarray) -> None:
    once = through(wire, x)
    parts = [np.split(np.where(np.isfinite(y), np.abs(y), 0), range(BLOCK, y.size, BLOCK)) for y in (x, once)]
    before, after = (np.frexp([part.max() for part in blocks])[1] for blocks in parts)
    assume(np.array_equal(before, after))  # else the largest of a block was rounded up to another power of two
    assert_same_bits(through(wire, once), once)


@HALF_WIRES
def test_a_number_that_is_not_finite_does_not_disturb_its_neighbours(wire: Wire) -> None:
    x = np.float32([1e-6, np.nan, -np.inf, 2e-6, 1e-6 / 3])
    arrived = through(wire, x)
    np.testing.assert_allclose(arrived[[0, 3, 4]], x[[0, 3, 4]], rtol=2**-11)
    assert np.isnan(arrived[1]) and arrived[2] == -np.inf


@pytest.mark.parametrize("wire", ["float32", "float64"])
def test_plain_wires_change_no_bit(wire: str) -> None:
    x = np.random.default_rng(0).standard_normal(999).astype(WIRES[wire].dtype)
    assert through(WIRES[wire], x).tobytes() == x.tobytes()


@pytest.mark.parametrize("wire", [*WIRES.values(), PORTABLE], ids=[*WIRES, "portable"])
@pytest.mark.parametrize(
    ("n", "P", "rank"), [*((n, P, rank) for n in (1, 256, 1000) for P, rank in ((1, 0), (64, 5))), (PIECE + 300, 3, 1)]
)
def test_the_owner_adds_up_in_rank_order_and_rounds_once(wire: Wire, n: int, P: int, rank: int) -> None:
    random = np.random.default_rng(P)
    contributions = (random.standard_normal((P, n)) * random.lognormal(0, 4, (P, 1))).astype(wire.dtype)
    room = wire.nbytes(-(-n // BLOCK) * BLOCK)
    first, stride = 40, room + 48  # as behind a header, with something else between
    received = np.random.default_rng(0).integers(0, 256, first + P * stride, np.uint8)
    for r in range(P):
        if r != rank:  # what is there for the owner itself is never looked at
            wire.encode(contributions[r], received[first + r * stride :][:room])
    message = np.zeros(room, np.uint8)
    wire.sum_and_encode(contributions[rank], rank, P, received, first, stride, message)

    total = np.zeros(n, wire.dtype)
    for r in range(P):
        total += contributions[r] if r == rank else through(wire, contributions[r])
    arrived = np.empty(n, wire.dtype)
    wire.decode(message, arrived)
    assert_same_bits(arrived, through(wire, total))


@pytest.mark.parametrize("wire", [*WIRES.values(), PORTABLE], ids=[*WIRES, "portable"])
def test_the_messages_of_a_large_gradient_take_no_memory_besides(wire: Wire) -> None:
    x = np.ones(4_000_000, wire.dtype)
    message, received = np.zeros((2, wire.nbytes(-(-x.size // BLOCK) * BLOCK)), np.uint8)

    def work(n: int) -> None:
        wire.encode(x[:n], message)
        wire.sum_and_encode(x[:n], 0, 2, np.concatenate([received, received]), 0, len(received), message)
        wire.decode(message, x[:n])
        wire.first_bad(x[:n])

    work(BLOCK)  # compiles
    both = 2 * len(received)  # what the others have sent
    assert peak_memory(lambda: work(x.size)) < both + x.nbytes / 2


@pytest.mark.parametrize("wire", [*WIRES.values(), PORTABLE], ids=[*WIRES, "portable"])
@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, PIECE + 299])
def test_a_number_that_is_not_finite_is_found_in_any_piece(wire: Wire, place: int) -> None:
    x = np.zeros(PIECE + 300, wire.dtype)
    x[place:] = np.nan
    assert wire.first_bad(x) == place
    assert not wire.encode(x, np.zeros(wire.nbytes(PIECE + 2 * BLOCK), np.uint8))


GRADIENTS = {"1e-3": 1e-3, "1e-5": 1e-5, "1e-7": 1e-7, "mixed": np.repeat([1e-2, 1e-7, 1e-4, 1e-9], 16 * BLOCK)}


def mean_over_ranks(P: int, std: float | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normal gradients of P ranks (P, n), their exact mean (n,), and what an owner and the float16 wire make of it."""
    parts = np.float32(np.random.default_rng(3).standard_normal((P, 64 * BLOCK)) * std)
    total = parts[0].copy()
    for part in parts[1:]:
        total += through(WIRES["float16"], part)
    return parts, parts.mean(axis=0, dtype=np.float64), through(WIRES["float16"], total) / P


@pytest.mark.parametrize("P", [2, 64])
@pytest.mark.parametrize("gradients", GRADIENTS)
def test_the_mean_is_within_3e_4_for_any_number_of_ranks_and_any_size_of_gradient(P: int, gradients: str) -> None:
    _, exact, ours = mean_over_ranks(P, GRADIENTS[gradients])
    for layer in range(0, exact.size, 16 * BLOCK):
        wanted, got = exact[layer : layer + 16 * BLOCK], ours[layer : layer + 16 * BLOCK]
        assert np.linalg.norm(got - wanted) <= 3e-4 * np.linalg.norm(wanted)
