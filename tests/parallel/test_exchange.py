"""The exchange: inputs that are functions of the rank, with answers in closed form."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from distconv.comm.choose import select
from distconv.comm.exchange import HEADER, Flat, part_size, parts
from distconv.comm.wire import BLOCK, WIRES
from distconv.comm.world import World

SIZES = (1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 1000, 123_552)
HALF_ROUNDING = 2.0**-11  # the largest relative rounding error of a half


def header(world: World, **fields: int | float) -> np.ndarray:
    record = np.zeros((), HEADER)
    record["step"], record["samples"], record["bad_at"] = 1, world.rank + 10, -1
    for name, value in fields.items():
        record[name] = value
    return record


def contribution(rank: int, size: int, std: float) -> np.ndarray:
    return (np.random.default_rng([size, rank]).standard_normal(size) * std).astype(np.float32)


@pytest.mark.parametrize("wire", ["float16", "float32", "float64"])
@pytest.mark.parametrize("size", SIZES)
def test_small_whole_numbers_are_summed_exactly_by_floats(world: World, wire: str, size: int) -> None:
    exchange = Flat(world.comm, size, WIRES[wire])
    for repeat in range(3):  # the buffers are used again
        vector = (np.arange(size) % 7 + world.rank + repeat).astype(WIRES[wire].dtype)
        exchange.sum(vector, header(world))
        P = world.size
        expected = P * (np.arange(size) % 7 + repeat) + P * (P - 1) / 2
        np.testing.assert_array_equal(vector, expected)


@pytest.mark.parametrize("wire", WIRES)
def test_headers_arrive_whole_and_in_rank_order(world: World, wire: str) -> None:
    exchange = Flat(world.comm, 5, WIRES[wire])
    headers = exchange.sum(
        np.zeros(5, WIRES[wire].dtype), header(world, busy_seconds=0.1 * world.rank, stop=world.rank == 1)
    )
    assert headers["samples"].tolist() == [rank + 10 for rank in range(world.size)]
    assert headers["busy_seconds"].tolist() == [0.1 * rank for rank in range(world.size)]
    assert headers["stop"].tolist() == [int(rank == 1) for rank in range(world.size)]


@pytest.mark.parametrize("std", [1e-3, 1e-5, 1e-7, 1e-20])
def test_the_half_wire_rounds_once_each_way_whatever_the_size_of_the_gradient(world: World, std: float) -> None:
    size = 10_000
    parts = [contribution(rank, size, std) for rank in range(world.size)]
    exact = np.sum(parts, axis=0, dtype=np.float64)
    vector = parts[world.rank].copy()
    Flat(world.comm, size, WIRES["float16"]).sum(vector, header(world))
    assert np.linalg.norm(vector - exact) <= 3e-4 * np.linalg.norm(exact)
    # Once out, once back; what falls below the smallest half of its block adds far less than one rounding.
    bound = HALF_ROUNDING * (np.abs(parts).sum(axis=0) + np.abs(exact)) * 1.01 + 1e-6 * std
    assert np.all(np.abs(vector - exact) <= bound)


@pytest.mark.parametrize("kind", ["flat", "two-level", "buckets"])
def test_the_int8_wire_is_right_in_the_mean_over_steps_and_never_far_off(world: World, kind: str) -> None:
    size, steps = 3000, 400
    parts = [contribution(rank, size, 1e-3) for rank in range(world.size)]
    exact = np.sum(parts, axis=0, dtype=np.float64)
    exchange = select(world.comm, size, "int8", kind)
    errors = np.zeros((steps, size))
    for step in range(steps):
        vector = parts[world.rank].copy()
        exchange.sum(vector, header(world, step=step))
        errors[step] = vector - exact
    exchange.close()
    grids = sum(np.abs(part).max() for part in [*parts, exact]) * 1.01 / 126
    assert np.abs(errors).max() <= grids
    spread = errors.std() / np.sqrt(steps)
    assert 0 < np.abs(errors.mean(axis=0)).max() < 6 * spread
    assert abs(errors.mean()) < 5 * spread / np.sqrt(size)


def test_layers_of_very_different_size_do_not_disturb_each_other(world: World) -> None:
    scales = np.repeat(np.float32([1e3, 1e-9, 1.0, 1e-6]), 64 * BLOCK)
    parts = [contribution(rank, scales.size, 1.0) * scales for rank in range(world.size)]
    exact = np.sum(parts, axis=0, dtype=np.float64)
    vector = parts[world.rank].copy()
    Flat(world.comm, scales.size, WIRES["float16"]).sum(vector, header(world))
    for got, wanted in zip(vector.reshape(4, -1), exact.reshape(4, -1), strict=True):
        assert np.linalg.norm(got - wanted) <= 3e-4 * np.linalg.norm(wanted)


def test_large_gradients_do_not_overflow(world: World) -> None:
    values = [40_000.0, 60_000.0, 65_504.0, 1e30]
    for value in values:
        vector = np.full(1000, value, np.float32)
        Flat(world.comm, 1000, WIRES["float16"]).sum(vector, header(world))
        np.testing.assert_allclose(vector, value * world.size, rtol=2.1 * HALF_ROUNDING)


@pytest.mark.parametrize("wire", WIRES)
def test_all_ranks_hold_the_same_bits_and_a_repeat_gives_them_again(world: World, wire: str) -> None:
    exchange = Flat(world.comm, 123_552, WIRES[wire])
    digests = set()
    for _ in range(2):
        vector = contribution(world.rank, 123_552, 1e-3).astype(WIRES[wire].dtype)
        exchange.sum(vector, header(world))
        digests.update(world.comm.allgather(hashlib.sha256(vector.tobytes()).hexdigest()))
    assert len(digests) == 1


def test_float64_vectors_cross_a_float64_wire_without_loss(world: World) -> None:
    parts = [np.random.default_rng(rank).standard_normal(777) for rank in range(world.size)]
    vector = parts[world.rank].copy()
    Flat(world.comm, 777, WIRES["float64"]).sum(vector, header(world))
    np.testing.assert_allclose(vector, np.sum(parts, axis=0), rtol=0, atol=1e-14 * world.size)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_reaches_every_rank_and_stays_where_it_is(
    world: World, wire: str, bad: float
) -> None:
    vector = np.ones(3 * BLOCK, WIRES[wire].dtype)
    if world.rank == world.size - 1:
        vector[BLOCK + 3] = bad
    Flat(world.comm, vector.size, WIRES[wire]).sum(vector, header(world))
    assert np.flatnonzero(~np.isfinite(vector)).tolist() == [BLOCK + 3]
    rounding = 2.1 / 126 if wire == "int8" else 0
    np.testing.assert_allclose(np.delete(vector, BLOCK + 3), world.size, rtol=rounding)


def test_half_or_a_quarter_of_the_bytes_of_float32_are_sent(world: World) -> None:
    size = 1 << 20
    sent = {wire: Flat(world.comm, size, WIRES[wire]).bytes_sent for wire in WIRES}
    P = world.size
    assert sent["float32"] == pytest.approx(2 * (P - 1) / P * 4 * size, rel=0.001)  # what a ring allreduce sends
    assert sent["float16"] <= 0.505 * sent["float32"]
    assert sent["int8"] <= 0.26 * sent["float32"]


@pytest.mark.parametrize("kind", ["flat", "two-level", "buckets", "mpi"])
def test_a_header_is_whatever_its_owner_has_to_say(world: World, kind: str) -> None:
    words = np.dtype([("word", "S5"), ("step", np.int64), ("bad_at", np.int64)])  # 21 bytes
    exchange = select(world.comm, 700, "float32", kind, words)
    vector = np.ones(700, np.float32)
    if world.rank == 0:
        vector[300] = np.nan
    headers = exchange.sum(vector, np.array((b"rank%d" % world.rank, 0, 0), words))
    assert headers["word"].tolist() == [b"rank%d" % rank for rank in range(world.size)]
    assert headers["bad_at"].tolist() == [300] + [-1] * (world.size - 1)
    exchange.close()
    with pytest.raises(ValueError, match="bad_at"):
        select(world.comm, 700, "float32", kind, np.dtype([("word", "S5")]))


@pytest.mark.parametrize("kind", ["flat", "two-level", "mpi"])
def test_a_sum_that_is_refused_changes_nothing_and_the_next_one_is_right(world: World, kind: str) -> None:
    exchange = select(world.comm, 700, "float32", kind)
    for step in range(3):
        vector = np.full(700, world.rank, np.float32)
        headers = exchange.sum(vector, header(world, step=step), lambda headers: bool(headers["step"][0] == 1))
        assert headers["step"].tolist() == [step] * world.size
        np.testing.assert_array_equal(vector, world.rank if step == 1 else sum(range(world.size)))
    exchange.close()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("size", SIZES)
def test_every_number_has_one_owner_and_blocks_are_not_divided(size: int, count: int) -> None:
    slices = parts(size, count)
    np.testing.assert_array_equal(np.concatenate([np.arange(size)[part] for part in slices]), np.arange(size))
    assert len(slices) == count and part_size(size, count) % BLOCK == 0
    assert all(part.stop - part.start in (0, part_size(size, count)) or part.stop == size for part in slices)
