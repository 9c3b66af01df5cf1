"""A training step on a GPU: its layers one by one, beside what the GPU can do. benchmarks/step.py times whole steps.

A layer is started again and again from one graph, so that what is measured is the GPU and not how fast the host starts
kernels. Its floating-point operations are those of its products; its bytes are what it must read and write at least.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distconv.benchmarks.step import Engine, Parts, Row, layers_of, random_dataset, step_flops, steps_of_a_turn
from distconv.comm.world import World
from distconv.config import Config
from distconv.nn.layers import Context
from distconv.nn.parameters import Views
from distconv.run.build import build_run
from distconv.run.loop import train
from distconv.run.replica import Replica
from distconv.run.run import Run

AT_ONCE, TURNS = 20, 5  # starts of a layer in a graph, and replays that are timed


@dataclass(frozen=True)
class LayerRow:
    """One way through a layer; way: forward or backward. flops may be 0: it multiplies no matrices."""

    layer: str
    way: str
    batch_size: int
    seconds: float
    flops: int
    nbytes: int


class GpuBench:
    """distconv with its steps recorded as graphs, and with kernels that start one by one; made collectively."""

    def __init__(
        self, world: World, model: str, batch_size: int, repeats: int, precision: str, say: Callable[[str], None]
    ) -> None:
        self.model, self.batch_size = model, batch_size
        settings = Config(model=model, batch_size=batch_size, epochs=1, device="cuda", precision=precision)
        steps = steps_of_a_turn(batch_size)
        runs = [build_run(settings, random_dataset(model, batch_size, repeats, steps), world, say) for _ in range(2)]
        for run, graphs in zip(runs, (True, False), strict=True):
            run.replica.device.records = graphs
        self.run = runs[0]
        names = ("distconv", "distconv-eager")
        self.engines = [_engine(name, run, steps) for name, run in zip(names, runs, strict=True)]

    def look_inside(self, rows: Sequence[Row]) -> tuple[Parts, str]:
        """See CpuBench. rows: of the engines."""
        replica, world = self.run.replica, self.run.world
        step = next(row.median_seconds for row in rows if row.engine == "distconv")
        layers = layer_rows(replica, self.model, -(-self.batch_size // world.size))
        parts = {(row.layer, row.way): row.seconds for row in layers}
        parts["rest", ""] = max(0.0, step - sum(parts.values()))
        try:
            peaks = replica.device.peaks()
        except Exception as error:  # cuBLAS or cuRAND is missing or fails: CuPy has many ways to say so
            peaks = str(error).strip().partition("\n")[0] or type(error).__name__
        return parts, where(layers, step, peaks)


def _engine(name: str, run: Run, steps: int) -> Engine:
    records, device = train(run, lambda: False, ahead=True), run.replica.device

    def turn() -> None:
        for _ in range(steps):
            next(records)
        device.synchronize()  # the step that has begun is the first one of the next turn

    return Engine(name, run.config.wire, turn, lambda: run.measure("test"), steps)


def layer_rows(replica: Replica, name_of_model: str, batch_size: int) -> list[LayerRow]:
    """Both ways through each layer of the replica's model, on random numbers."""
    kernels = replica.kernels
    samples = kernels.device.upload(np.arange(batch_size, dtype=np.int32))
    context = Context(training=True, step=kernels.device.zeros(2, np.uint32), samples=samples, kernels=kernels)
    x, _ = random_dataset(name_of_model, batch_size, 0).batch("train", samples, context)
    flops = step_flops(name_of_model)
    rows: list[LayerRow] = []
    for name, layer in layers_of(replica.model):
        row, x = _both_ways(replica, name, layer, x, context, first=not rows)
        rows += [
            LayerRow(name, way, batch_size, seconds, batch_size * flops.get((name, way), 0), nbytes)
            for way, (seconds, nbytes) in row.items()
        ]
    return rows


def _both_ways(
    replica: Replica, name: str, layer: Any, x: Any, context: Context, first: bool
) -> tuple[Mapping[str, tuple[float, int]], Any]:
    """Seconds and bytes of each way, and y."""
    device, params, grads = replica.device, replica.values, replica.grads
    if layer is not replica.model:
        params, grads, context = params.get(name, {}), grads.get(name, {}), context.within(name)
    y, backward = layer.forward(x, params, context)
    dy = device.upload(np.random.default_rng(0).standard_normal(y.shape).astype(np.float32))
    weights = _nbytes(params)
    forward = seconds_on(device, (name, "forward", len(x)), lambda: layer.forward(x, params, context))
    back = seconds_on(device, (name, "backward", len(x)), lambda: (backward(dy, grads, not first), device.join()))
    dx = 0 if first else x.nbytes
    return {
        "forward": (forward, x.nbytes + y.nbytes + weights),
        "backward": (back, x.nbytes + y.nbytes + dy.nbytes + 2 * weights + dx),
    }, y


def _nbytes(views: Views) -> int:
    """Of arrays that are nested as the layers are."""
    return sum(_nbytes(view) if isinstance(view, Mapping) else view.nbytes for view in views.values())


def seconds_on(device: Any, key: Any, work: Callable[[], object]) -> float:
    """How long the work keeps the device busy."""

    def again_and_again() -> None:
        for _ in range(AT_ONCE):
            work()

    times = []
    for _ in range(2 + TURNS):
        device.synchronize()
        began = time.perf_counter()
        device.replayed(key, again_and_again)
        device.synchronize()
        times.append(time.perf_counter() - began)
    return float(np.median(times[2:])) / AT_ONCE  # the first ran plainly, the second recorded


def where(rows: Sequence[LayerRow], step_seconds: float, peaks: tuple[float, float] | str) -> str:
    """For people: each layer's time, and its share of the measured peaks (FLOP/s of sgemm, bytes/s of a copy).

    peaks: a text says why there are none.
    """
    head = f"{f'batch {rows[0].batch_size}':>12}" + "forward   backward us".rjust(24)
    lines = [head if isinstance(peaks, str) else f"{head}  share of sgemm  of memory"]
    for name in dict.fromkeys(row.layer for row in rows):
        ways = [row for row in rows if row.layer == name]
        seconds = sum(row.seconds for row in ways)
        cells = "".join(f"{1e6 * row.seconds:>11.1f}" for row in ways)
        shares = ""
        if not isinstance(peaks, str):
            flops, nbytes = (sum(of) / seconds for of in zip(*((row.flops, row.nbytes) for row in ways), strict=True))
            shares = f"   {f'{flops / peaks[0]:.0%}' if flops else '':>16}{nbytes / peaks[1]:>11.0%}"
        lines.append(f"{name:>12}{cells}{shares}")
    total = sum(row.seconds for row in rows)
    lines.append(f"layers one by one {1e6 * total:,.1f} us, the whole step {1e6 * step_seconds:,.1f} us")
    if isinstance(peaks, str):
        lines.append(f"the peaks, and so each layer's share of them, could not be measured: {peaks}")
    else:
        tera, giga = peaks[0] / 1e12, peaks[1] / 1e9
        lines.append(f"measured peaks: {tera:.1f} TFLOP/s in float32 (sgemm), {giga:,.0f} GB/s (copy)")
    return "\n".join(lines)
