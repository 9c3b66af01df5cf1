"""The traces of steps over each exchange, and of GPUs, which are emulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from distconv.comm.world import World
from distconv.config import Config
from distconv.run import agreement, loop, trace
from distconv.run.build import build_run
from distconv.run.log import RunLog
from distconv.run.run import Run
from distconv.run.trace import Trace
from tests.emulator import available
from tests.parallel.test_gpu_steps import SETTINGS, dataset, never
from tests.parallel.test_on_gpu import WithNccl
from tests.traces import check_barriers, check_form, named, read

Result = TypeVar("Result")
LAYERS = ["conv1", "conv2", "affine1", "dropout1", "affine2"]
STEPS = [4, 5]


@pytest.fixture
def file(world: World, tmp_path: Path) -> Path:
    return Path(world.comm.bcast(str(tmp_path / "trace.json")))


def follow(run: Run, stop_at: int = 0, ahead: bool = False) -> None:
    """Train with a trace of it, up to a stop if there is one."""
    tracing = Trace(run, SimpleNamespace(save=never), RunLog(False))  # type: ignore[arg-type]
    for _ in tracing.watch(loop.train(run, lambda: bool(stop_at) and run.step + 1 >= stop_at, ahead=ahead)):
        pass
    tracing.close()
    run.world.comm.Barrier()  # until rank 0 has written


def attributes(run: Run) -> list[dict[str, Any]]:
    """What a trace intercepts, as it is now."""
    owners = [run, run.replica, run.data, agreement, *trace._parts(run.replica.exchange)]
    return [{k: v for k, v in vars(owner).items() if callable(v)} for owner in owners] + [{"": run.replica.model}]


def settings(file: Path, **changes: Any) -> Config:
    return dataclasses.replace(SETTINGS, device="cpu", trace=str(file), trace_steps=len(STEPS), **changes)


@pytest.mark.parametrize(
    ("kind", "wire", "barriers"),
    [
        ("flat", "float16", ("scatter", "gather")),
        ("two-level", "float16", ("wait",)),
        ("buckets", "float32", ("scatter", "gather")),
        ("flat", "int16", ("gather",)),
        ("mpi", "float32", ("allreduce",)),
    ],
)
def test_each_exchange_shows_its_parts_on_one_clock(
    world: World, file: Path, kind: str, wire: str, barriers: tuple[str, ...]
) -> None:
    changes = {"exchange": kind, "wire": wire, "shards": world.size if wire == "int16" else 0}
    run = build_run(settings(file, **changes), dataset(), world)
    before = attributes(run)
    follow(run)
    assert attributes(run) == before
    untraced = build_run(dataclasses.replace(run.config, trace=""), dataset(), world)
    list(loop.train(untraced, never))
    assert untraced.parameters.vector.tobytes() == run.parameters.vector.tobytes()

    found, ranks = read(file), range(world.size)
    check_form(found, world.size)
    assert found["otherData"]["steps"] == STEPS
    parts = {"allreduce"} if kind == "mpi" else {"scatter", "gather", "sum", "decode"}
    if wire == "int16" or (world.size > 1 and kind not in ("mpi", "two-level")):  # on one host
        parts.add("encode")
    if kind in ("two-level", "buckets") or (world.size > 1 and kind == "flat"):
        parts.add("wait")
    for rank in ranks:
        of_step = {"batch", "checksum", "compute", "exchange", "loss", "update"}
        of_step |= {f"step {step}" for step in STEPS} | {"agree", "end of epoch", "evaluate"}
        of_step |= {f"{name} {way}" for name in (*LAYERS, "model") for way in ("forward", "backward")}
        between = {"between hosts"} if kind == "two-level" else set()
        on_thread = {"bucket 1", *parts} if kind == "buckets" else set()
        on_thread -= {"wait"} if world.size == 1 else set()  # for messages: there are none
        saves = {"save"} if rank == 0 and named(found, 0, "save") else set()
        main = of_step | between | saves | (parts if kind != "buckets" else {"wait"})
        assert {event["name"] for event in named(found, rank, timeline=0)} == main
        assert {event["name"] for event in named(found, rank, timeline=1)} == on_thread
    assert check_barriers(found, world.size, barriers) >= len(barriers) * len(STEPS)


def test_each_rank_shows_its_layers_in_each_step(world: World, file: Path) -> None:
    """Once for each part of the rank's samples."""
    follow(build_run(settings(file, accumulate=2, batch_size=4), dataset(), world))
    found = read(file)
    for rank in range(world.size):
        (step,) = named(found, rank, f"step {STEPS[0]}")
        for name in (f"{layer} {way}" for layer in LAYERS for way in ("forward", "backward")):
            within = [e for e in named(found, rank, name) if 0 <= e["ts"] - step["ts"] <= step["dur"]]
            assert len(within) == 2, name


def test_a_stop_leaves_what_there_is(world: World, file: Path) -> None:
    run = build_run(settings(file), dataset(), world)
    before = attributes(run)
    follow(run, stop_at=4)
    assert attributes(run) == before
    found = read(file)
    check_form(found, world.size)
    assert found["otherData"]["steps"] == STEPS[:1] and run.step == 4


def test_what_is_rare_does_not_grow_without_end(world: World, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MOST", 3)
    follow(build_run(settings(file), dataset(), world))
    found = read(file)
    rare = [e for e in named(found, 0) if e["name"] in ("evaluate", "agree", "end of epoch")]
    assert len(rare) == 3
    # Two epochs of two evaluations and one agreement each.
    assert found["otherData"]["spans_left_out"] == {f"rank {rank}": 2 * 4 - 3 for rank in range(world.size)}


class Stamped(WithNccl):
    """An emulated GPU that tells when its work was done, and need not replay it."""

    records = True

    def stamp(self) -> int:
        return trace.time.perf_counter_ns()

    def nanoseconds(self, first: int, last: int) -> int:
        return last - first

    def replayed(self, key: object, work: Callable[[], Result], agreed: Any = None) -> Result:
        return super().replayed(key, work, agreed) if self.records else work()


@pytest.mark.skipif(not available(), reason="no g++ to build the kernels for the CPU")
@pytest.mark.parametrize("kind", ["staged", "nccl"])
def test_a_gpu_shows_its_layers_though_steps_are_replayed(
    world: World, file: Path, folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "COLD", 2)  # of which the second is recorded

    def build() -> Run:
        device = Stamped(folder, world, "missing" if kind == "staged" else "", on_rank=0)
        of_one_step = dataclasses.replace(settings(file), device="auto", trace_steps=1)
        return build_run(of_one_step, dataset(), world, device=device)

    run, untraced = build(), build()
    follow(run, ahead=True)
    assert run.replica.device.records
    list(loop.train(untraced, never, ahead=True))
    for one in (run, untraced):
        one.replica.pull()
    assert run.parameters.vector.tobytes() == untraced.parameters.vector.tobytes()

    found = read(file)
    check_form(found, world.size)
    assert "not replayed" in found["otherData"]["gpu"] and found["otherData"]["gpu_clock_error_us"] >= 0
    needs_no_host = run.replica.exchange.needs_no_host
    for rank in range(world.size):
        device = [event["name"] for event in named(found, rank, timeline=2)]
        assert all(device.count(f"{layer} {way}") == 1 for layer in LAYERS for way in ("forward", "backward"))
        assert {"batch", "loss", "update", "before exchange", "after exchange"} <= set(device)
        assert ({"scatter", "gather"} <= set(device)) == (needs_no_host and world.size > 1)
        assert {"compute", "exchange"} <= {event["name"] for event in named(found, rank, timeline=0)}
