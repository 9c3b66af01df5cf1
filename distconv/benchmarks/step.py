"""One training step and one evaluation of a network on these ranks, and where the time of the step goes.

The step is the loop's own, on random images of the shape that the network is made for. Its layers, exchange and
optimizer are spans of run/spans.py, which cost some 20 microseconds a step. Engines take turns, so that a disturbance
of the machine meets all of them. Each turn begins with a barrier and takes as long as its slowest rank.
"""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distconv.comm.world import World
from distconv.config import Config
from distconv.data.dataset import Dataset
from distconv.formatting import plural
from distconv.nn.layers import Chain, Layer
from distconv.nn.networks import build_network, usual_image_shape
from distconv.nn.summary import parts
from distconv.run.build import build_run
from distconv.run.loop import StepRecord, train
from distconv.run.spans import WHOLE, Spans, traced

CLASSES = 10
WARM_UP = 3  # turns that do not count: they compile, touch memory and try the wire
PRODUCT, PRODUCTS = 1024, 9  # rows and columns of the matrices whose product is the peak, and how often
LEAST_STEPS, LEAST_IMAGES = 4, 2000  # of a turn on a GPU
KIBIBYTE = 1024  # the unit of Linux's ru_maxrss
Parts = Mapping[tuple[str, str], float]  # of a step, in seconds


@dataclass(frozen=True)
class Row:
    """One engine at one batch size; batch_size is that of all ranks together. phase: step or evaluate."""

    engine: str
    device: str
    ranks: int
    threads: int
    batch_size: int
    wire: str
    phase: str
    median_seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Engine:
    """Something that trains and evaluates: a call is a turn, over the global batch; collective.

    steps: that a turn makes. When it ends, the device has nothing left to do, so no engine's turn pays for another's.
    """

    name: str
    wire: str
    step: Callable[[], object]
    evaluate: Callable[[], object]
    steps: int = 1


@dataclass(frozen=True)
class Breakdown:
    """Where a step goes. parts: seconds of rank 0, in the order of the step, that add up to the step; their names are
    (layer, "forward" or "backward"), ("exchange", "") and so on. page_faults: of a step; peak_bytes: of memory, that
    the process has held so far; both of the rank that has most.
    """

    batch_size: int
    parts: Parts
    page_faults: int
    peak_bytes: int


def random_dataset(model: str, batch_size: int, repeats: int, steps: int = 1) -> Dataset:
    """Enough images for a model that no turn of so many steps ends an epoch, and a batch of test images."""
    stream, count = np.random.default_rng(0), ((WARM_UP + repeats) * steps + 2) * batch_size
    images = stream.integers(0, 256, (count, *usual_image_shape(model)), np.uint8)
    labels = stream.integers(0, CLASSES, count, np.uint8)
    return Dataset("random", images, labels, images[:batch_size], labels[:batch_size], CLASSES)


def steps_of_a_turn(batch_size: int) -> int:
    """On a GPU, which begins a step while the host works for the last: one alone shows less.

    A turn finds caches cold and the GPU idle, which costs some 400 us, as much as a step of 100 images. Many short
    steps share that.
    """
    return max(LEAST_STEPS, -(-LEAST_IMAGES // batch_size))


class CpuBench:
    """Our own engine on the CPU, with notes of each step. None of `repeats` steps ends an epoch; made collectively."""

    def __init__(self, world: World, model: str, batch_size: int, repeats: int) -> None:
        self.model = model
        settings = Config(model=model, batch_size=batch_size, epochs=1, device="cpu")
        run = build_run(settings, random_dataset(model, batch_size, repeats), world)
        replica = run.replica
        self.run, self.spans = run, Spans()
        self.layers = [name for name, _ in layers_of(replica.model)]
        self.spans.intercept(replica.exchange, "travel", "exchange")
        self.spans.intercept(replica.optimizer, "step", "optimizer")
        replica.model = traced(replica.model, self.spans)
        self.records = train(run, lambda: False)
        self.notes: list[tuple[float, dict[tuple[str, str], float], int]] = []  # seconds, parts, page faults
        self.engines = [Engine("distconv", self.run.config.wire, self.step, lambda: self.run.measure("test"))]

    def step(self) -> None:
        self.spans.noted.clear()
        faults, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        record = next(self.records)
        seconds = time.perf_counter() - began
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        assert isinstance(record, StepRecord)
        found = self.spans.seconds()
        parts = {(name, way): time for (name, way), time in found.items() if name in self.layers}
        optimizer, exchange = found["optimizer", ""], found["exchange", ""]
        wait = min(record.wait_seconds, exchange)
        others = {"exchange": exchange - wait, "wait": wait, "optimizer": optimizer}
        parts.update({(name, ""): time for name, time in others.items()})
        parts["rest", ""] = seconds - sum(parts.values())
        self.notes.append((seconds, parts, faults))

    def breakdown(self) -> Breakdown:
        """The mean of the parts over the middle half of the steps by length, so that they add up; collective."""
        notes = sorted(self.notes[WARM_UP:], key=lambda note: note[0])
        middle = [parts for _, parts, _ in notes[len(notes) // 4 : len(notes) - len(notes) // 4]]
        mean = {part: float(np.mean([parts[part] for parts in middle])) for part in middle[0]}
        faults = int(np.median([faults for _, _, faults in notes]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBIBYTE
        comm = self.run.world.comm
        return Breakdown(self.run.config.batch_size, mean, max(comm.allgather(faults)), max(comm.allgather(peak)))

    def look_inside(self, rows: Sequence[Row]) -> tuple[Parts, str]:
        """The parts of a step, for a picture, and a text for people; once the engines were measured; collective."""
        breakdown, world = self.breakdown(), self.run.world
        return breakdown.parts, where(breakdown, step_flops(self.model), world.size, peak_flops(world))


def measure(
    world: World, engines: Sequence[Engine], device: str, batch_size: int, threads: int, phase: str, repeats: int
) -> list[Row]:
    """A row for each engine; collective."""
    times: list[list[float]] = [[] for _ in engines]
    for _ in range(WARM_UP + repeats):
        for engine, own in zip(engines, times, strict=True):
            turn = engine.step if phase == "step" else engine.evaluate
            world.comm.Barrier()
            began = time.perf_counter()
            turn()
            own.append((time.perf_counter() - began) / (engine.steps if phase == "step" else 1))
    slowest = np.max(world.comm.allgather(times), axis=0)  # (engines, turns)
    medians = [float(np.median(own[WARM_UP:])) for own in slowest]
    return [
        Row(engine.name, device, world.size, threads, batch_size, engine.wire, phase, median, batch_size / median)
        for engine, median in zip(engines, medians, strict=True)
    ]


def layers_of(model: Layer) -> Sequence[tuple[str, Layer]]:
    """What a step's time is told of, by name: the layers of a Chain, or any other model as a whole."""
    return model.layers if type(model) is Chain else [(WHOLE, model)]


def step_flops(name: str) -> dict[tuple[str, str], int]:
    """Floating-point operations of one image in the matrix products of the forward and backward pass of each layer.

    dw and dx cost what y costs; the first product needs no dx. Winograd's convolution takes fewer of them than this.
    """
    model, _ = build_network(name, usual_image_shape(name), CLASSES, (CLASSES,))
    layers = dict(layers_of(model))
    found: dict[tuple[str, str], int] = defaultdict(int)
    for part in parts(model, usual_image_shape(name)):
        if part.flops:
            first, adjoints = part.name.partition(".")[0], 2 if found else 1
            layer = first if first in layers else WHOLE
            found[layer, "backward"] += part.flops * adjoints
            found[layer, "forward"] += part.flops
    return dict(found)


def peak_flops(world: World) -> float:
    """Floating-point operations a second of all ranks in float32 matrix products at the same time; collective."""
    a, b = np.random.default_rng(0).standard_normal((2, PRODUCT, PRODUCT), np.float32)
    c, seconds = np.empty_like(a), []
    world.comm.Barrier()
    for _ in range(PRODUCTS):
        began = time.perf_counter()
        np.matmul(a, b, out=c)
        seconds.append(time.perf_counter() - began)
    return float(sum(world.comm.allgather(2 * PRODUCT**3 / np.median(seconds))))


HEAD = f"{'phase':>9}{'batch':>7}{'engine':>16}{'wire':>9}{'ms':>10}{'images/s':>10}{'distconv is':>13}"


def table(rows: Sequence[Row]) -> str:
    """For people, below HEAD: a line for each row, with our images a second over those of the engine beside it."""
    lines = []
    for row in rows:
        base = next(r for r in rows if (r.phase, r.batch_size) == (row.phase, row.batch_size))
        ratio = "" if row is base else f"{base.images_per_second / row.images_per_second:.2f} times"
        lines.append(
            f"{row.phase:>9}{row.batch_size:>7}{row.engine:>16}{row.wire:>9}{1e3 * row.median_seconds:>10.2f}"
            f"{row.images_per_second:>10,.0f}{ratio:>13}".rstrip()
        )
    return "\n".join(lines)


def where(step: Breakdown, flops: Mapping[tuple[str, str], int], ranks: int, peak: float) -> str:
    """For people: the parts of a step in ms, its rate beside the peak (FLOP/s of all ranks), its memory."""
    images, seconds = -(-step.batch_size // ranks), sum(step.parts.values())  # of rank 0
    lines = [f"batch {step.batch_size}, rank 0:".ljust(20) + "forward   backward ms  of step  GFLOP/s"]
    for name in dict.fromkeys(name for name, _ in step.parts):
        ways = [step.parts.get((name, way), 0.0) for way in ("forward", "backward")]
        total = sum(ways) or step.parts.get((name, ""), 0.0)
        cells = "".join(f"{1e3 * way:>10.2f}" for way in ways) if any(ways) else f"{1e3 * total:>20.2f}"
        work = images * (flops.get((name, "forward"), 0) + flops.get((name, "backward"), 0))
        rate = f"{work / total / 1e9:>9.1f}" if work else ""
        lines.append(f"{name:>17}{cells}{total / seconds:>12.1%}{rate}")
    rate_of_step = images * sum(flops.values()) / seconds
    lines += [
        f"{'step':>17}{1e3 * seconds:>20.2f}{1:>12.1%}{rate_of_step / 1e9:>9.1f}",
        f"{sum(flops.values()) / 1e6:.1f} MFLOP an image, counted without Winograd's savings: "
        f"{rate_of_step * ranks / peak:.0%} of sgemm's {peak / ranks / 1e9:.1f} GFLOP/s a rank",
        f"a rank had {plural(step.page_faults, 'page fault')} a step and held at most "
        f"{step.peak_bytes / 2**20:,.0f} MiB",
    ]
    return "\n".join(lines)
