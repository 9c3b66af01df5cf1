"""What the GPU does within a step, kernel by kernel, by PyTorch's profiler: `python -m tests.gpu_timeline tf32 100`.

First how long a step takes in a run of its own, and its graph alone, started again and again: if these differ, the host
or what surrounds the graph costs time. Last what the kernels of one name take together.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distconv.benchmarks.step import random_dataset
from distconv.comm.start import start
from distconv.config import Config
from distconv.kernels.gpu.convolution import PRECISIONS
from distconv.run.build import build_run
from distconv.run.loop import Record, train

WARM_UP, PROFILED = 12, 12  # steps
FIRST_KERNEL = "begin_step"


def seconds_of_steps(records: Iterator[Record], steps: int) -> list[float]:
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        next(records)
        times.append(time.perf_counter() - began)
    return times


def seconds_of_graph(device: Any, steps: int) -> float:
    graph = next(recording.graph for recording in device.recordings.values() if recording.graph)
    device.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        graph.launch(device.stream)
    device.synchronize()
    return (time.perf_counter() - began) / steps


def events_of_steps(records: Iterator[Record], device: Any) -> list[dict[str, Any]]:
    """Kernels and copies in the order of their start, ts and dur in us."""
    profiler = importlib.import_module("torch.profiler")
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            next(records)
        device.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return sorted((event for event in events if event.get("cat") in kinds), key=lambda event: float(event["ts"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precision", choices=PRECISIONS)
    parser.add_argument("batch_size", type=int)
    parser.add_argument("--model", default="deepconvnet")
    arguments = parser.parse_args()
    model, batch_size, precision = arguments.model, arguments.batch_size, arguments.precision
    settings = Config(model=model, batch_size=batch_size, epochs=1, device="cuda", precision=precision)
    steps = 2 * max(10, 10000 // batch_size)  # even, so that the graph alone ends at the slot of the next message
    dataset = random_dataset(model, batch_size, WARM_UP + steps + PROFILED)
    run = build_run(settings, dataset, start(), print)
    device, records = run.replica.device, train(run, lambda: False, ahead=True)
    seconds_of_steps(records, WARM_UP)
    wall, graph = 1e6 * np.quantile(seconds_of_steps(records, steps), [0.1, 0.5, 0.9]), seconds_of_graph(device, steps)
    print(f"{model}, {precision}, batch {batch_size}: a step takes {wall[1]:.1f} us ({wall[0]:.1f} to "
          f"{wall[2]:.1f}), its graph {1e6 * graph:.1f} us")  # fmt: skip
    events = events_of_steps(records, device)
    starts = [i for i, event in enumerate(events) if event["name"].startswith(FIRST_KERNEL)]
    first, last = starts[-3:-1]  # a step before the last, in the middle of others
    for event in events[first:last]:
        details = event.get("args", {})
        print(
            f"{event['ts'] - events[first]['ts']:9.1f} +{event['dur']:7.1f} us  stream {details.get('stream')}  "
            f"{event['name'][:30]:30}  grid {details.get('grid')} of {details.get('block')}, "
            f"{details.get('registers per thread')} registers"
        )
    times = defaultdict(list)
    for event in events[first:last]:
        times[event["name"]].append(event["dur"])
    for name, durations in sorted(times.items(), key=lambda item: -sum(item[1])):
        print(f"{sum(durations):9.1f} us in {len(durations):3} of {name[:30]}")


if __name__ == "__main__":
    main()
