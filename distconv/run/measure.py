"""What a model gives on a part of the data, without dropout: the ranks share the work, and all know the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from distconv.comm.world import World
from distconv.data.data import Data
from distconv.data.shard import Shards, split
from distconv.kernels.interface import Array, Kernels
from distconv.nn.layers import Context, Layer
from distconv.nn.parameters import Views
from distconv.tasks.task import Task


def scores(
    data: Data, model: Layer, values: Views, kernels: Kernels, world: World, done: Callable[[float], None] | None = None
) -> Array:
    """What the model gives the test samples of this rank's share -> (share, classes), on the host.

    A share is what `split` says, so those of all ranks one after another are the scores of all samples. done: told
    after each batch which part of the share is done, up to 1.
    """
    found = []
    share = split(data.size("test"), world.size, world.rank)
    for context in _contexts(share, kernels, world):
        x, _ = data.batch("test", context.samples, context)
        found.append(kernels.device.download(model.forward(x, values, context)[0]))
        if done:
            done(sum(map(len, found)) / (share.stop - share.start))
    return np.concatenate(found) if found else np.empty((0, data.classes), np.float32)


def measure(
    task: Task, data: Data, part: str, model: Layer, values: Views, kernels: Kernels, world: World, shards: Shards,
    most: int = 0
) -> tuple[float, float]:  # fmt: skip
    """The two sums of Task.evaluate over the first `most` samples of a part (0: all), each once; collective.

    Those of the shards are added up in their order, so all ranks have the same bits.
    """
    size, found = data.size(part), []
    count = min(most or size, size)
    start = shards.part(count).start
    for shard in shards.parts(count):
        sums = np.zeros(2)
        for context in _contexts(slice(start + shard.start, start + shard.stop), kernels, world):
            sums += task.evaluate(model, values, data.batch(part, context.samples, context), context)
        found.append(sums)
    score, weight = np.concatenate(world.comm.allgather(found)).cumsum(axis=0)[-1]
    return float(score), float(weight)


def _contexts(mine: slice, kernels: Kernels, world: World) -> Iterator[Context]:
    """One for each batch of these samples."""
    for start in range(mine.start, mine.stop, kernels.evaluation_batch):
        world.at("evaluate")
        samples = np.arange(start, min(start + kernels.evaluation_batch, mine.stop), dtype=np.int32)
        yield Context(training=False, samples=kernels.device.upload(samples), kernels=kernels)
    world.at("gather")
