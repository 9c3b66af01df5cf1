"""What computes a step: the cores of this rank, or its GPU.

The loop asks an engine for the gradient of this rank's share, for the sum over the ranks, and for the update. On the
CPU these are three calls. A GPU does as much of them as it can without the host in one graph, which is recorded once
and replayed from then on; what changes from step to step (its number, the optimizer's scalars, which samples) goes to
the GPU in one small message, and what the host must know (the loss, and whether all was finite) comes back in another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from distconv.comm.buckets import Buckets
from distconv.comm.exchange import Headers
from distconv.comm.on_gpu import GpuExchange, first_problem
from distconv.data.dataset import Bytes, pixels
from distconv.errors import DistconvError
from distconv.kernels.cpu import arithmetic as cpu
from distconv.kernels.cpu import updates
from distconv.kernels.gpu.arithmetic import FINITE, Gpu
from distconv.kernels.gpu.device import Agreed
from distconv.kernels.interface import Array
from distconv.nn.fusion import fused
from distconv.nn.layers import EVALUATION, Context, Layer, is_ours
from distconv.nn.parameters import Parameters
from distconv.run.run import Run, Samples

MOST_SCALARS = 4  # of an optimizer
T = TypeVar("T")


def local_gradient(
    model: Layer, parameters: Parameters, images: Bytes, labels: Bytes, context: Context, global_batch: int
) -> float:
    """Write this rank's share of the gradient of the mean loss over the global batch; return its sum of losses.

    images (N, H, W, C) and labels (N,) are the rank's shard, which may be empty.
    """
    if len(images) == 0:
        parameters.gradient[...] = 0
        return 0.0
    x = pixels(images, parameters.vector.dtype)
    scores, backward = model.forward(x, parameters.values, context)
    loss_sum, dscores = cpu.softmax_cross_entropy(scores, labels, global_batch)
    backward(dscores, parameters.grads, False)
    return loss_sum


class CpuEngine:
    """Works on the run's own arrays, and keeps nothing itself."""

    device = "cpu"
    evaluation_batch = 100

    def gradient(
        self, run: Run, samples: Samples, global_batch: int, step: int, probing: bool = False,
        following: Samples | None = None
    ) -> float:  # fmt: skip
        images, labels = run.dataset.train_images[samples], run.dataset.train_labels[samples]
        overlaps = isinstance(run.exchange, Buckets) and not probing
        on_final = _sender(run.exchange, run.parameters) if overlaps else None
        context = Context(training=True, seed=run.config.seed, step=step, samples=samples, on_final=on_final)
        return local_gradient(run.model, run.parameters, images, labels, context, global_batch)

    def contribution(self, run: Run) -> Array:
        return run.probe.sample(run.parameters.gradient)

    def sum(self, run: Run, header: Headers) -> Headers:
        headers: Headers = run.exchange.sum(run.parameters.gradient, header)
        return headers

    def total(self, run: Run) -> Array:
        return run.parameters.gradient

    def update(self, run: Run, t: int) -> bool:
        good: bool = run.exchange.wire.first_bad(run.parameters.gradient) < 0  # the same bits on all ranks
        if good:
            run.optimizer.step(run.parameters.vector, run.parameters.gradient, t)
        return good

    def checksum(self, run: Run) -> int:
        return sum(int(updates.checksum(vector.view(np.uint32))) for vector in run.vectors().values())

    def classify(self, model: Layer, parameters: Parameters, images: Bytes) -> NDArray[np.int64]:
        scores, _ = model.forward(pixels(images, parameters.vector.dtype), parameters.values, EVALUATION)
        classes: NDArray[np.int64] = np.argmax(scores, axis=1)
        return classes

    def pull(self, run: Run) -> None:
        pass

    def push(self, run: Run) -> None:
        pass


CPU = CpuEngine()


def _sender(exchange: Buckets, parameters: Parameters) -> Callable[[str], None]:
    """What sends off the gradients of a layer of the model, and of those behind it, when they are final."""

    def send(layer: str) -> None:
        start = parameters.start(layer)
        if start is not None:
            exchange.ready(parameters.gradient, start)

    return send


class GpuEngine:
    """Holds the run's vectors and its training set on a device; the run's own arrays are up to date after pull only."""

    device = "cuda"
    evaluation_batch = 2000

    def __init__(self, kernels: Gpu, run: Run, exchange: GpuExchange) -> None:
        self.kernels, self.exchange, self.seed = kernels, exchange, run.config.seed
        kernels.apart = is_ours(run.model)  # a user's layer may look at gradients before the backward pass is over
        self.model, device = fused(run.model), kernels.device
        self.images, self.labels = device.upload(run.dataset.train_images), device.upload(run.dataset.train_labels)
        self.vector = device.upload(run.parameters.vector)
        self.summed = device.zeros(run.parameters.size, np.float32)  # this rank's gradient, then the sum of all
        self.values, self.grads = run.parameters.nested(self.vector), run.parameters.nested(self.summed)
        self.no_gradient = device.zeros(run.parameters.size, np.float32)
        self.state = {slot: device.upload(vector) for slot, vector in run.optimizer.state.items()}
        self.rule = type(run.optimizer).__name__.lower()

        # What a step is told: its number as two words, the optimizer's scalars, the samples. What it tells: the sum of
        # losses, and where this rank's gradient and the sum are not finite first. Twice, as a step may begin before
        # the host has read what the one before tells.
        words = 2 + MOST_SCALARS + run.config.batch_size  # room for a rank that is alone
        self.told, self.bad = device.empty(4 * words, np.uint8), device.zeros(2, np.int32)
        self.step_number, self.scalars, self.samples = _fields(self.told)
        self.told_here, self.loss_here, self.bad_here = (
            [device.pinned(n) for _ in range(2)] for n in (4 * words, 8, 8)
        )
        self.begun: dict[int, Any] = {}  # steps whose results nobody has waited for yet, by their number
        self.probing = False  # whether the last gradient waits to be looked at
        self.whole = False  # whether it came with its sum and its update

    def gradient(
        self, run: Run, samples: Samples, global_batch: int, step: int, probing: bool = False,
        following: Samples | None = None
    ) -> float:  # fmt: skip
        self.probing, self.whole = probing, self.exchange.needs_no_host and not probing
        if step not in self.begun:
            self._begin(run, samples, global_batch, step)
        if following is not None and self.whole:
            self._begin(run, following, global_batch, step + 1)
        self.kernels.device.wait(self.begun.pop(step))
        return float(self.loss_here[step % 2].view(np.float64)[0]) if len(samples) else 0.0

    def _begin(self, run: Run, samples: Samples, global_batch: int, step: int) -> None:
        device, probing, whole, here = self.kernels.device, self.probing, self.whole, step % 2
        number, scalars, indices = _fields(self.told_here[here])
        number[:] = step & 0xFFFFFFFF, step >> 32
        of_step = run.optimizer.scalars(step + 1)
        scalars[: len(of_step)] = of_step
        indices[: len(samples)] = samples

        def work() -> Array | None:
            loss = self._gradient(len(samples), global_batch)
            if not probing:
                self.exchange.before(self.summed, self.bad)
            if whole:
                self._finish()
            return loss

        device.copy(self.told, self.told_here[here])
        agreed = (lambda problem: first_problem(run.world, problem)) if whole else None
        loss = self._run(("gradient", len(samples), global_batch, probing), work, agreed)
        if loss is not None:
            device.copy(self.loss_here[here], loss)
        device.copy(self.bad_here[here], self.bad)
        self.begun[step] = device.mark()

    def _gradient(self, n: int, global_batch: int) -> Array | None:
        """Start what gives this rank's share of the gradient -> its sum of losses, on the device, if it has samples."""
        kernels, device = self.kernels, self.kernels.device
        samples = self.samples[:n]
        x, labels = kernels.begin_step(self.images, self.labels, samples, self.bad[:1], self.bad[1:])
        if n == 0:
            device.copy(self.summed, self.no_gradient)
            return None
        context = Context(training=True, seed=self.seed, step=self.step_number, samples=samples, kernels=kernels)
        scores, backward = self.model.forward(x, self.values, context)
        loss: Array
        loss, dscores = kernels.softmax_cross_entropy(scores, labels, global_batch)
        backward(dscores, self.grads, False)
        device.join()
        return loss

    def contribution(self, run: Run) -> Array:
        return run.probe.sample(self.total(run))

    def sum(self, run: Run, header: Headers) -> Headers:
        here, device = self.bad_here[int(header["step"]) % 2], self.kernels.device
        if self.probing:
            self.exchange.before(self.summed, self.bad)
            device.copy(here, self.bad)
            device.synchronize()
        bad_at = here.view(np.int32)[0]
        header["bad_at"] = -1 if bad_at == FINITE else bad_at
        headers = self.exchange.travel(header)
        if self.probing:
            self.exchange.after(self.summed, self.bad)
        return headers

    def total(self, run: Run) -> Array:
        vector: Array = self.kernels.device.download(self.summed)
        return vector

    def update(self, run: Run, t: int) -> bool:
        here = self.bad_here[(t - 1) % 2]
        if not self.whole:
            self._run(("update", self.probing), self._finish)
            self.kernels.device.copy(here, self.bad)
            self.kernels.device.synchronize()
        return bool(here.view(np.int32)[1] == FINITE)

    def _finish(self) -> None:
        """What follows when the sums are there."""
        if not self.probing:
            self.exchange.after(self.summed, self.bad)
        arguments = self.vector, self.summed, *self.state.values(), self.scalars, self.bad[1:]
        self.kernels.launch("updates", self.rule, self.vector.size, *arguments, self.vector.size)

    def _run(self, key: Any, work: Callable[[], T], agreed: Agreed | None = None) -> T:
        try:
            result: T = self.kernels.device.replayed(key, work, agreed)
        except MemoryError as error:
            raise DistconvError(
                f"the GPU has too little memory for this rank's share of a step ({error}): use a smaller --batch-size, "
                f"or more ranks on GPUs of their own"
            ) from None
        return result

    def checksum(self, run: Run) -> int:
        return 0  # the memory of a GPU in a cluster corrects itself (ECC); agree() compares what ranks hold

    def classify(self, model: Layer, parameters: Parameters, images: Bytes) -> NDArray[np.int64]:
        context = Context(training=False, kernels=self.kernels)
        scores, _ = self.model.forward(self.kernels.pixels(images), self.values, context)
        classes: NDArray[np.int64] = self.kernels.argmax(scores)
        return classes

    def pull(self, run: Run) -> None:
        download = self.kernels.device.download
        run.parameters.vector[...] = download(self.vector)
        for slot, vector in self.state.items():
            run.optimizer.state[slot][...] = download(vector)

    def push(self, run: Run) -> None:
        device = self.kernels.device
        self.begun.clear()
        pairs = [(self.vector, run.parameters.vector)]
        pairs += [(vector, run.optimizer.state[slot]) for slot, vector in self.state.items()]
        for there, here in pairs:
            device.copy(there, device.upload(here))


def _fields(told: Array) -> tuple[Array, Array, Array]:
    """The parts of what a step is told, as numbers: its number (2,), the scalars, the samples."""
    scalars_end = 8 + 4 * MOST_SCALARS
    return told[:8].view(np.uint32), told[8:scalars_end].view(np.float32), told[scalars_end:].view(np.int32)
