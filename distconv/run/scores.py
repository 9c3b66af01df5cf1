"""The scores that a model gives the test set, without dropout: the ranks share the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from distconv.comm.world import World
from distconv.data.data import Data
from distconv.data.shard import split
from distconv.kernels.interface import Array, Kernels
from distconv.nn.layers import Context, Layer
from distconv.nn.parameters import Views


def scores(
    data: Data, model: Layer, values: Views, kernels: Kernels, world: World, done: Callable[[float], None] | None = None
) -> Array:
    """What the model gives the test samples of this rank's share -> (share, classes), on the host.

    A share is what `split` says, so those of all ranks one after another are the scores of all samples. done: told
    after each batch which part of the share is done, up to 1.
    """
    found = []
    share = split(data.size("test"), world.size, world.rank)
    for context in contexts(share, kernels, world):
        x, _ = data.batch("test", context.samples, context)
        found.append(kernels.device.download(model.forward(x, values, context)[0]))
        if done:
            done(sum(map(len, found)) / (share.stop - share.start))
    return np.concatenate(found) if found else np.empty((0, data.classes), np.float32)


def contexts(mine: slice, kernels: Kernels, world: World) -> Iterator[Context]:
    """One for each batch of these samples."""
    for start in range(mine.start, mine.stop, kernels.evaluation_batch):
        world.at("evaluate")
        samples = np.arange(start, min(start + kernels.evaluation_batch, mine.stop), dtype=np.int32)
        yield Context(training=False, samples=kernels.device.upload(samples), kernels=kernels)
    world.at("gather")
