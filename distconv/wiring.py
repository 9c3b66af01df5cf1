"""A run put together from its settings: model, parameters, optimizer, exchange."""

from __future__ import annotations

import numpy as np

from distconv.comm.exchange import choose
from distconv.comm.half import WIRES, Wire
from distconv.comm.probe import WireProbe
from distconv.comm.world import World
from distconv.config import Config
from distconv.data.dataset import Dataset
from distconv.kernels.half import BLOCK
from distconv.loop import Run, local_gradient
from distconv.nn.layers import Context, Layer
from distconv.nn.networks import build_network
from distconv.nn.optimizers import OPTIMIZERS, Optimizer
from distconv.nn.parameters import Parameters


def build_run(settings: Config, dataset: Dataset, world: World) -> Run:
    """The run at its start, rank 0's first weights on all ranks; collective.

    Raises UsageError for a model or an exchange that cannot be, MismatchError where the ranks' code differs.
    """
    with world.together():
        model, specs = build_network(settings.model, dataset.image_shape, dataset.classes)
        parameters = Parameters(specs, WIRES[settings.wire].dtype)  # no use in sums finer than what is summed
    world.agree("the model", parameters.layout(), "give all hosts the same code")
    parameters.initialize(settings.seed)
    world.comm.Bcast(parameters.vector)
    optimizer = OPTIMIZERS[settings.optimizer](parameters.size, parameters.vector.dtype, settings.lr)
    with world.together():  # collective inside too, but where it raises it does so on all ranks
        exchange = choose(world, parameters.size, settings.wire, settings.exchange)
    compile_kernels(model, parameters, type(optimizer), dataset, exchange.wire, world)
    exact = "float64" if settings.wire == "float64" else "float32"
    probe = WireProbe(settings.wire, lambda: choose(world, parameters.size, exact))
    return Run(settings, dataset, model, parameters, optimizer, world, exchange, probe)


def compile_kernels(
    model: Layer, parameters: Parameters, kind: type[Optimizer], dataset: Dataset, wire: Wire, world: World
) -> None:
    """Call what a step calls, on one image: first on one rank of each host, which compiles what is not in the cache."""
    if world.local_rank != 0:
        world.wait_on_host()
    context = Context(training=True, samples=np.zeros(1, np.int64))
    local_gradient(model, parameters, dataset.train_images[:1], dataset.train_labels[:1], context, 1)
    parameters.gradient[...] = 0
    value, gradient = np.zeros((2, 1), parameters.vector.dtype)
    kind(1, parameters.vector.dtype, 1.0).step(value, gradient, 1)
    numbers, message = np.zeros(BLOCK, wire.dtype), np.zeros(wire.nbytes(BLOCK), np.uint8)
    wire.encode(numbers, message)
    wire.sum_and_encode(numbers, 0, 2, np.tile(message, 2), 0, len(message), message)
    wire.decode(message, numbers)
    wire.first_bad(numbers)
    if world.local_rank == 0:
        world.wait_on_host()
