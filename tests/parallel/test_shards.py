"""Shards: what the ranks of this job compute together has the bits of what one of them computes alone."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.random import Generator

import distconv
from distconv.comm import exact as exacts
from distconv.comm import transport
from distconv.comm.choose import select
from distconv.comm.exact import EXACT_WIRES, Exact
from distconv.comm.exchange import Flat, TwoLevel, step_header
from distconv.comm.world import World
from distconv.config import OPTIMIZERS, Config
from distconv.data.dataset import Dataset
from distconv.data.shard import Shards
from distconv.errors import UsageError
from distconv.nn.blocks import Branches, Residual
from distconv.nn.layers import Affine, Chain, Conv, Dropout, Layer, MaxPool
from distconv.nn.normalization import ConvNorm, Standardize
from distconv.run import loop
from distconv.run.build import build_run
from distconv.run.run import Run
from tests.emulator import Emulator, available

SETTINGS = Config(
    data="random", epochs=2, batch_size=23, shards=8, wire="int16", optimizer="adam", device="cpu", eval_samples=31
)


@pytest.fixture(scope="module")
def alone(world: World) -> Iterator[World]:
    """A job of this rank alone."""
    with World(world.comm.Split(world.rank), world.library) as mine:
        yield mine


def dataset(rng: Generator, count: int, side: int, channels: int) -> Dataset:
    images = rng.integers(0, 256, (count, side, side, channels), np.uint8)
    labels = rng.integers(0, 4, count, np.uint8)
    return Dataset("random", images, labels, images[: count // 2], labels[: count // 2], 4)


def never() -> bool:
    return False


def told(run: Run) -> list[Any]:
    """All that a run tells but for times, bytes and what is rank 0's own, and the bits that it ends with."""
    found: list[Any] = []
    for record in loop.train(run, never):
        fields = dataclasses.asdict(record)
        timed = ("images_per_second", "wire_bytes", "slowest_rank", "agreed", "flushed_share")
        found.append({k: v for k, v in fields.items() if "seconds" not in k and k not in timed})
    return [*found, run.measure("test"), run.digest()]


def some_network(rng: Generator) -> Layer:
    """Layers of all roads of the CPU: Winograd's, of one channel, patches, any pooling, dropout, batch norm, blocks."""
    filters = int(rng.choice([8, 16, 30]))
    first: list[Layer] = [Conv(filters, 3, 1, 1, relu=True), MaxPool()]
    more: list[Layer] = [
        Conv(16, 3, 1, 1, relu=True),
        Residual(Chain(ConvNorm(16, stride=2), ConvNorm(16, relu=False)), ConvNorm(16, 1, 2, relu=False)),
        Branches(ConvNorm(16, 1), Chain(ConvNorm(5, 1), ConvNorm(16, 5)), Chain(MaxPool(3, 1, 1), Conv(3, 1))),
        Conv(int(rng.choice([5, 16])), 3, int(rng.integers(1, 3)), 1),
        Dropout(0.3),
    ]
    middle = [layer for layer in more if rng.random() < 0.7]
    return Chain(*first, *middle, Affine(int(rng.integers(3, 40)), relu=True), Dropout(0.5), Affine(4))


@pytest.mark.parametrize("seed", range(6))
def test_any_network_batch_and_number_of_shards_gives_the_bits_of_one_rank(
    world: World, alone: World, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shards = int(rng.integers(world.size, 12))
    settings = dataclasses.replace(
        SETTINGS,
        shards=shards,
        batch_size=int(rng.integers(shards, 40)),
        wire=str(rng.choice(["int16", "int32"])),
        accumulate=int(rng.integers(1, 3)),
        seed=seed,
        epochs=1,
    )
    data = dataset(rng, int(rng.integers(60, 90)), int(rng.integers(8, 15)), int(rng.choice([1, 3, 16])))
    model = some_network(rng)
    wanted = told(build_run(settings, data, alone, model=model))
    assert told(build_run(settings, data, world, model=model)) == wanted


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_ends_with_the_bits_of_one_rank(world: World, alone: World, optimizer: str) -> None:
    settings = dataclasses.replace(
        SETTINGS, optimizer=optimizer, lr=0.01, weight_decay=0.01, clip_norm=0.5, ema=0.9, label_smoothing=0.1,
        epochs=1, augment="mnist,flip,erase=0.2",
    )  # fmt: skip
    data, model = dataset(np.random.default_rng(0), 60, 10, 1), Chain(Conv(16, relu=True), MaxPool(), Affine(4))
    assert told(build_run(settings, data, world, model=model)) == told(build_run(settings, data, alone, model=model))


def test_a_run_goes_on_in_the_middle_of_an_epoch_on_another_number_of_ranks(world: World, alone: World) -> None:
    data, model = dataset(np.random.default_rng(1), 100, 10, 1), Chain(ConvNorm(16), MaxPool(), Affine(4))
    wanted = told(build_run(SETTINGS, data, alone, model=model))
    first, middle = build_run(SETTINGS, data, world, model=model), None
    for record in loop.train(first, never):
        if record.step == 7:
            middle = pickle.loads(pickle.dumps((first.position(), first.vectors())))
            break
    second = build_run(SETTINGS, data, alone, model=model)
    second.restore(*middle)
    rest = told(second)
    assert rest == wanted[-len(rest) :] and len(rest) == 3 + 1 + 2  # the steps 8 to 10, the epoch, test and digest


@pytest.mark.parametrize("batch_size", [23, 7])
def test_batch_norm_on_a_wire_of_floats_is_that_of_one_rank(world: World, alone: World, batch_size: int) -> None:
    """Running means too. With 7 shards of 23 or of 7 samples, and a last batch of 4 or 2, some ranks have no sample."""
    settings = dataclasses.replace(
        SETTINGS, wire="float64", shards=7, batch_size=batch_size, epochs=1, optimizer="momentum", lr=0.01
    )
    data = dataset(np.random.default_rng(3), 23 * 4 + 4 if batch_size == 23 else 58, 9, 3)
    body = Chain(ConvNorm(16, stride=2), ConvNorm(16, relu=False))
    model = Chain(Standardize(), ConvNorm(8), Residual(body, ConvNorm(16, 1, 2, relu=False)), Affine(4))
    one, many = (build_run(settings, data, where, model=model) for where in (alone, world))
    share = one.replica.share(3, np.arange(batch_size), batch_size).copy()
    many.replica.share(3, np.arange(batch_size)[many.shards.part(batch_size)], batch_size)
    together = many.replica.sum_shares()
    for name, wanted in one.parameters.named(share).items():
        assert np.linalg.norm(many.parameters.named(together)[name] - wanted) <= 1e-12 * np.linalg.norm(wanted), name

    first = one.parameters.vector.copy()
    for run in (one, many):
        list(loop.train(run, never))
    for name, wanted in one.parameters.named(one.parameters.vector).items():
        found = many.parameters.named(many.parameters.vector)[name]
        assert np.linalg.norm(found - wanted) <= 1e-9 * np.linalg.norm(wanted), name
        is_fixed = name.startswith("standardize1")
        assert is_fixed == np.array_equal(wanted, one.parameters.named(first)[name]), name


def vectors(count: int, size: int) -> np.ndarray:
    return (np.random.default_rng(size).standard_normal((count, size)) * 1e-4).astype(np.float32)


@pytest.mark.parametrize("size", [1, 300, 10_000])
@pytest.mark.parametrize("wire", EXACT_WIRES)
def test_every_carrier_gives_the_bits_of_one_rank(
    world: World, wire: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, comm = Shards(9, world.size, world.rank), world.comm
    header = step_header(shards.most)
    numbers = EXACT_WIRES[wire].numbers
    of_all = dataclasses.replace(EXACT_WIRES[wire], contributions=9)

    def over(inner: Any) -> Exact:
        return Exact(comm, size, of_all, inner)

    carriers = [
        select(comm, size, wire, "auto", header, contributions=9),
        select(comm, size, wire, "mpi", header, contributions=9),
    ]
    if world.size % 2 == 0:
        hosts = comm.Split(world.rank % 2)
        carriers.append(over(TwoLevel(comm, hosts, size, numbers, header)))
    monkeypatch.setattr("distconv.comm.exchange.connect", transport.Messages)
    monkeypatch.setattr(exacts, "connect", transport.Messages)
    carriers.append(over(Flat(comm, size, numbers, header=header)))

    wanted = vectors(9, size)
    select(comm.Split(world.rank), size, wire, "flat", step_header(9), contributions=9).sum(
        wanted, np.zeros((), step_header(9))
    )
    for carrier in carriers:
        for _ in range(2):  # the buffers are used again
            mine, record = vectors(9, size)[shards.own], np.zeros((), header)
            record["samples"] = world.rank
            headers = carrier.sum(mine, record)
            assert mine[0].tobytes() == wanted[0].tobytes(), carrier.how
            assert headers["samples"].tolist() == list(range(world.size))
            assert (headers["bad_at"] == -1).all()
        carrier.close()


def test_a_shard_that_is_not_finite_is_told_of_and_the_step_is_skipped_everywhere(world: World) -> None:
    shards = Shards(5, world.size, world.rank)
    exchange = select(world.comm, 1000, "int16", "auto", step_header(shards.most), contributions=5)
    mine = vectors(5, 1000)[shards.own]
    if 4 in shards.own:
        mine[-1, 700] = np.inf
    headers = exchange.sum(mine, np.zeros((), step_header(shards.most)))
    assert headers["bad_at"].tolist() == [*[-1] * (world.size - 1), 700]
    assert exchange.wire.first_bad(mine[0]) == 512  # the block begins there
    assert np.isfinite(mine[0][:512]).all() and np.isfinite(mine[0][768:]).all()


@pytest.mark.parametrize("wire", EXACT_WIRES)
def test_anybodys_sum_does_not_hang_on_the_order_of_the_ranks(world: World, wire: str) -> None:
    P, size = world.size, 700
    wanted, header = vectors(P, size), step_header(P)
    select(world.comm.Split(world.rank), size, wire, "flat", header, contributions=P).sum(wanted, np.zeros((), header))
    for order in (range(P), [(2 * rank + 1) % P if P % 2 else P - 1 - rank for rank in range(P)]):
        with distconv.Allreduce(world.comm, size, wire) as allreduce:
            found = allreduce.sum(vectors(P, size)[order[world.rank]])
            assert found.tobytes() == wanted[0].tobytes()
            bad = vectors(P, size)[order[world.rank]]
            if world.rank == P - 1:
                bad[300] = np.nan
            assert np.isnan(allreduce.mean(bad)[300])
            assert allreduce.last is not None
            assert [(told.rank, told.index) for told in allreduce.last.not_finite] == [(P - 1, (300,))]


def test_half_of_float32s_bytes_travel(world: World) -> None:
    size = 123_552
    exact, floats = (select(world.comm, size, wire, "flat") for wire in ("int16", "float32"))
    if world.size > 1:
        assert exact.bytes_sent <= 0.52 * floats.bytes_sent


def test_buckets_are_refused_as_no_part_of_a_sum_is_ready_before_the_others(world: World) -> None:
    with pytest.raises(UsageError, match=r"--exchange buckets --wire int16: .* use --exchange auto"):
        build_run(
            dataclasses.replace(SETTINGS, exchange="buckets"),
            dataset(np.random.default_rng(0), 60, 8, 1),
            world,
            model=Chain(Affine(4)),
        )


@pytest.mark.skipif(not available(), reason="no g++ to build the kernels for the CPU")
def test_gpus_give_the_bits_of_one_gpu_and_the_losses_of_cpus(world: World, alone: World, folder: Path) -> None:
    data = dataset(np.random.default_rng(2), 60, 8, 1)
    model = Chain(Conv(4, pad=1, relu=True), MaxPool(), Affine(6, relu=True), Dropout(), Affine(4))
    for shards in (4, 7):
        settings = dataclasses.replace(SETTINGS, shards=shards, batch_size=9, device="auto", epochs=1)
        found, wanted = (
            told(build_run(settings, data, ranks, model=model, device=Emulator(folder))) for ranks in (world, alone)
        )
        assert str(found) == str(wanted)  # as the noise scale is not known, and no NaN equals another
        cpu = told(build_run(dataclasses.replace(settings, device="cpu"), data, world, model=model))
        losses = [[record["train_loss"] for record in records[:-2]] for records in (found, cpu)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
