"""The ways the bytes can go: each gives what the format and the order of the sum say, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from distconv.comm import buckets, transport
from distconv.comm import exchange as exchanges
from distconv.comm.choose import choose
from distconv.comm.exchange import HEADER, Flat, TwoLevel
from distconv.comm.mpi_allreduce import half_problem
from distconv.comm.shared_memory import share
from distconv.comm.wire import WIRES, random_key
from distconv.comm.world import World
from distconv.errors import UsageError

SIZES = (1, 255, 256, 257, 600, 2000, 10_000)  # with 1, 2, 3, 8 and 40 blocks, so that some ranks own nothing
SEED, STEP = 3, 5


def contribution(rank: int, size: int) -> np.ndarray:
    return (np.random.default_rng([size, rank]).standard_normal(size) * 1e-4).astype(np.float32)


def header(world: World) -> np.ndarray:
    record = np.zeros((), HEADER)
    record["step"], record["samples"], record["busy_seconds"] = STEP, 10 * world.rank, world.rank / 7
    return record


def through(wire: str, x: np.ndarray, sender: int = 0, place: int = 0) -> np.ndarray:
    message, arrived = np.zeros(WIRES[wire].nbytes(-(-x.size // 256) * 256), np.uint8), np.empty_like(x)
    WIRES[wire].encode(x, message, random_key(SEED, STEP, sender, place))
    WIRES[wire].decode(message, arrived)
    return arrived


def flat_model(P: int, size: int, wire: str, contributions: list[np.ndarray], place: int = 0) -> np.ndarray:
    """The flat exchange in one process. place: of the vector in the gradient."""
    part = -(-size // (P * 256)) * 256
    result = np.zeros(size, np.float32)
    for owner in range(P):
        where = slice(min(size, owner * part), min(size, (owner + 1) * part))
        total = np.zeros(where.stop - where.start, np.float32)
        for rank in range(P):
            own = contributions[rank][where]
            total += own if rank == owner else through(wire, own, rank, place + where.start)
        result[where] = through(wire, total, P, place + where.start)
    return result


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wire", ["float16", "int8", "float32"])
def test_shared_memory_and_messages_give_the_bits_of_the_model(
    world: World, wire: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = flat_model(world.size, size, wire, [contribution(rank, size) for rank in range(world.size)])
    here = Flat(world.comm, size, WIRES[wire], seed=SEED)
    monkeypatch.setattr(exchanges, "connect", transport.Messages)
    there = Flat(world.comm, size, WIRES[wire], seed=SEED)
    assert there.how == "flat, messages" and here.how == ("flat, shared memory" if world.size > 1 else "flat, messages")
    for exchange in (here, there, here, there):
        vector = contribution(world.rank, size)
        exchange.sum(vector, header(world))
        assert vector.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("patient", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wire", ["float16", "int8", "float32", "float64"])
def test_who_owns_nothing_is_sent_headers_only_and_sends_nothing_to_all(
    world: World, wire: str, size: int, patient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanges, "connect", transport.Messages)
    exchange = Flat(world.comm, size, WIRES[wire], patient)
    blocks, P, untouched = -(-size // 256), world.size, 0xAA
    owners = -(-blocks // -(-blocks // P))
    part = WIRES[wire].nbytes(-(-blocks // P) * 256)
    messages = exchange.transport
    messages.received[:] = untouched
    for row in messages.gathered:
        row[:] = untouched
    exchange.sum(contribution(world.rank, size).astype(WIRES[wire].dtype), header(world))

    parts = messages.received.reshape(P, -1)[:, HEADER.itemsize :]
    assert parts.shape[1] == part
    assert [not (row == untouched).all() for row in messages.gathered] == [rank < owners for rank in range(P)]
    if world.rank >= owners:
        assert (parts == untouched).all()
    sent = world.comm.allgather(exchange.bytes_sent)
    assert sum(sent) == P * (P - 1) * HEADER.itemsize + 2 * (P - 1) * owners * part
    assert sent[0] == max(sent)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wire", ["int16", "int32", "float16", "float32"])
@pytest.mark.parametrize("kind", ["flat", "two-level", "buckets", "mpi"])
def test_every_carrier_sums_vectors_of_fewer_blocks_than_ranks(world: World, kind: str, wire: str, size: int) -> None:
    if (wire.startswith("int") and kind == "buckets") or (kind, wire) == ("mpi", "float16"):
        return  # which are refused, or are MPI's own business
    exchange = choose(world, size, wire, kind)
    vector = np.full(size, np.float32(world.rank + 1) / 2)
    headers = exchange.sum(vector, header(world))
    exchange.close()
    lost = 0 if wire in ("float16", "float32") else 2e-4
    np.testing.assert_allclose(vector, world.size * (world.size + 1) / 4, rtol=lost)
    assert headers["samples"].tolist() == [10 * rank for rank in range(world.size)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("hosts", ["in blocks", "round robin"])
@pytest.mark.parametrize("wire", ["float16", "int8", "float32"])
def test_two_levels_add_up_on_each_host_and_then_between_hosts(world: World, wire: str, hosts: str, size: int) -> None:
    if world.size % 2:
        pytest.skip("needs an even number of ranks")
    H, L = 2, world.size // 2
    host_of = [rank // L if hosts == "in blocks" else rank % H for rank in range(world.size)]
    exchange = TwoLevel(world.comm, world.comm.Split(host_of[world.rank]), size, WIRES[wire], seed=SEED)
    assert exchange.how.startswith(f"two-level, 2 hosts x {L} ranks")

    parts = [contribution(rank, size) for rank in range(world.size)]
    on_host = [np.zeros(size, np.float32) for _ in range(H)]
    for rank, host in enumerate(host_of):
        on_host[host] += parts[rank]
    part = -(-size // (L * 256)) * 256  # of the vector, for each rank of a host
    wanted = np.concatenate(
        [
            flat_model(H, len(on_host[0][i : i + part]), wire, [h[i : i + part] for h in on_host], i)
            for i in range(0, size, part)
        ]
    )
    for _ in range(3):
        vector = parts[world.rank].copy()
        headers = exchange.sum(vector, header(world))
        assert vector.tobytes() == wanted.tobytes()
        assert headers["samples"].tolist() == [10 * rank for rank in range(world.size)]
        assert headers["busy_seconds"].tolist() == [rank / 7 for rank in range(world.size)]


def test_two_levels_send_fewer_bytes_between_hosts(world: World) -> None:
    if world.size != 4:
        pytest.skip("needs 4 ranks")
    two = TwoLevel(world.comm, world.comm.Split(world.rank // 2), 1 << 18, WIRES["float16"])
    flat = Flat(world.comm, 1 << 18, WIRES["float16"])
    assert two.bytes_sent == pytest.approx(flat.bytes_sent / 3, rel=0.01)  # 1/2 of half the vector; 3/4 of all of it


@pytest.mark.parametrize("wire", ["float16", "float32", "float64"])
def test_the_librarys_own_sum_is_near_ours(world: World, wire: str) -> None:
    if wire == "float16" and half_problem(world.comm):
        with pytest.raises(UsageError, match="halves"):
            choose(world, 1000, wire, "mpi")
        return
    exchange = choose(world, 1000, wire, "mpi")
    vector = contribution(world.rank, 1000).astype(WIRES[wire].dtype)
    exact = sum(contribution(rank, 1000).astype(np.float64) for rank in range(world.size))
    headers = exchange.sum(vector, header(world))
    assert np.linalg.norm(vector - exact) <= (2e-2 if wire == "float16" else 1e-6) * np.linalg.norm(exact)
    assert headers["samples"].tolist() == [10 * rank for rank in range(world.size)]


def test_a_library_that_adds_halves_wrongly_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        """As MPICH 5.0 built without _Float16: 0 + 0 is 6.1e-5."""

        rank, size = world.rank, world.size

        def Allreduce(self, mine: np.ndarray, sums: np.ndarray) -> None:
            world.comm.Allreduce(mine.astype(np.float32), total := np.empty(len(mine), np.float32))
            sums[...] = np.where(total == 0, 6.1e-5, np.clip(total, -65504, 65504))

        def allgather(self, value: int) -> list[int]:
            return world.comm.allgather(value)

    assert "wrongly" in str(half_problem(Wrong()))  # type: ignore[arg-type]


def test_memory_that_the_host_does_not_have_is_not_taken(world: World) -> None:
    assert share(world.comm, 1 << 50) is None


def test_two_levels_need_the_same_number_of_ranks_on_each_host(world: World) -> None:
    if world.size != 3:
        pytest.skip("needs 3 ranks")
    with pytest.raises(ValueError, match="same number of ranks"):
        TwoLevel(world.comm, world.comm.Split(min(world.rank, 1)), 1000, WIRES["float16"])


@pytest.mark.parametrize("wire", ["float16", "int8"])
@pytest.mark.parametrize("network", [True, False])
def test_buckets_arrive_whatever_was_ready_when(
    world: World, wire: str, network: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "BUCKET", 512)
    if network:
        monkeypatch.setattr(exchanges, "connect", transport.Messages)
    size = 5 * 512 + 77
    exchange = choose(world, size, wire, "buckets", seed=SEED)
    assert isinstance(exchange, buckets.Buckets) and exchange.how.startswith("6 buckets")
    parts = [contribution(rank, size) for rank in range(world.size)]
    wanted = np.concatenate(
        [
            flat_model(world.size, len(parts[0][i : i + 512]), wire, [p[i : i + 512] for p in parts], i)
            for i in range(0, size, 512)
        ]
    )
    for starts in ([], [0], [size], [2000, 1999, 600, 600, 3], [1024]):  # the order in which layers become final
        vector = np.full(size, np.nan, np.float32)
        final = size
        for start in starts:
            vector[start:final] = parts[world.rank][start:final]
            exchange.ready(vector, start, STEP)
            final = start
        vector[:final] = parts[world.rank][:final]
        headers = exchange.sum(vector, header(world))
        assert vector.tobytes() == wanted.tobytes()
        assert headers["samples"].tolist() == [10 * rank for rank in range(world.size)]
        assert headers["bad_at"].tolist() == [-1] * world.size


@pytest.mark.parametrize("kind", ["flat", "two-level", "buckets", "mpi"])
def test_every_carrier_tells_which_rank_is_not_finite_and_where(
    world: World, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "BUCKET", 512)
    exchange = choose(world, 2000, "float32", kind)
    vector = contribution(world.rank, 2000)
    if world.rank == world.size - 1:
        vector[[1500, 1700]] = np.inf, np.nan
    headers = exchange.sum(vector, header(world))
    assert headers["bad_at"].tolist() == [-1] * (world.size - 1) + [1500]
    assert np.flatnonzero(~np.isfinite(vector)).tolist() == [1500, 1700]
