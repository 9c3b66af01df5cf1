"""How much memory a rank will hold at most, told before the first step: for a batch job's limit, or a smaller batch.

What the process holds already is known, and what it has not touched yet is counted. What a step and an evaluation take
for their images is measured on few of them, as it grows by the same with every further image.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from distconv.comm.on_cpu import OnCpu
from distconv.data.augment import Augmented
from distconv.nn.layers import Context
from distconv.nn.optimizers import EMA
from distconv.run.run import Run

FEW = 64  # images of a trial: of fewer, what layers take whatever the images are may hide what these take
PICTURE = 22 << 20  # bytes that rank 0 takes at the end, for Matplotlib and the curves
STATUS = Path("/proc/self/status")  # of Linux


def tell_memory(run: Run, say: Callable[[str], None]) -> int | None:
    """Say how much memory this rank will hold, and return it in bytes; nothing where it computes on a GPU.

    Shared memory counts for each rank that uses it, as Linux counts it. Computes on some samples: all ranks do.
    """
    exchange = run.replica.exchange
    if not isinstance(exchange, OnCpu) or not STATUS.exists():
        return None
    try:
        held, activations = _activations(run)
    except MemoryError:
        return None  # the first step will tell
    parameters, gradients = run.parameters.vector.nbytes, run.replica.shares.nbytes
    slots, average = len(run.replica.slots) * parameters, parameters * (EMA in run.replica.state)
    probe = {run.probe.floats, run.probe.exact}
    buffers = exchange.inner.buffer_bytes + sum(one.buffer_bytes for one in probe)
    data = run.data.data if isinstance(run.data, Augmented) else run.data
    arrays = [array for array in getattr(data, "__dict__", {}).values() if isinstance(array, np.ndarray)]
    images = sum(array.nbytes for array in arrays)

    touched = parameters + parameters + average + held + images + slots * (run.step > 0)
    peak = 1024 * int(STATUS.read_text().split("VmHWM:")[1].split()[0])
    parts: dict[str, int] = {
        "program": max(0, peak - touched) + PICTURE * (run.world.rank == 0),
        "data set": images,
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": slots,
        "average of the weights": average,
        "exchange": buffers,
        "activations": activations,
    }
    total = sum(parts.values())
    shown = ", ".join(f"{name} {_mib(nbytes)}" for name, nbytes in parts.items() if nbytes > 1 << 20)
    say(f"memory: about {_mib(total)} MiB a rank ({shown})")
    return total


def _activations(run: Run) -> tuple[int, int]:
    """Bytes for the images of a pass: in the largest trial, and in the largest pass of the run."""
    replica, kernels = run.replica, run.replica.kernels
    batch = min(run.config.step_size, run.data.size("train"))
    share = run.shards.part(batch)
    own = replica.parts(share.stop - share.start, batch)  # none, where there are fewer images than ranks
    most = max((part.stop - part.start for _, part in own), default=0)
    test = max(part.stop - part.start for part in run.shards.parts(run.data.size("test")))

    def gradient(n: int) -> None:
        context = Context(training=True, samples=np.arange(n), kernels=kernels, global_batch=batch)
        data = run.data.batch("train", context.samples, context)
        run.task.gradient(replica.model, replica.values, replica.grads, data, context)

    def evaluation(n: int) -> None:
        context = Context(training=False, samples=np.arange(n), kernels=kernels)
        run.task.evaluate(replica.model, replica.values, run.data.batch("test", context.samples, context), context)

    found = [_measured(gradient, most), _measured(evaluation, min(test, kernels.evaluation_batch))]
    return max(trial for trial, _ in found), max(whole for _, whole in found)


def _measured(work: Callable[[int], None], n: int) -> tuple[int, int]:
    """The most bytes of NumPy's arrays in work(FEW), and in work(n), which is not done where it is more, or nothing."""
    if n == 0:
        return 0, 0
    few = min(n, FEW)
    trial = _peak(work, few)
    an_image = (trial - _peak(work, few // 2)) // (few - few // 2) if n > few else 0
    return trial, trial + an_image * (n - few)


def _peak(work: Callable[[int], None], n: int) -> int:
    tracemalloc.start()  # NumPy tells it of every array
    try:
        work(n)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f}"
