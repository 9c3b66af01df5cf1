"""A run put together from its settings: model, parameters, optimizer, and where it computes and exchanges."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from distconv.comm.choose import choose
from distconv.comm.on_gpu import choose_on_gpu
from distconv.comm.placement import Placement, place
from distconv.comm.probe import WireProbe
from distconv.comm.wire import WIRES, Wire
from distconv.comm.world import World
from distconv.config import Config
from distconv.data.dataset import Dataset
from distconv.errors import UsageError
from distconv.kernels.compiled import CACHE
from distconv.kernels.gpu.arithmetic import Gpu
from distconv.kernels.gpu.device import Cuda
from distconv.kernels.half import BLOCK
from distconv.nn.checked import checked
from distconv.nn.layers import Context
from distconv.nn.networks import build_network
from distconv.nn.optimizers import OPTIMIZERS
from distconv.nn.parameters import Parameters, count
from distconv.run.replica import CPU, GpuEngine, local_gradient
from distconv.run.run import Run
from distconv.run.same_code import agree_on_code


def build_run(
    settings: Config,
    dataset: Dataset,
    world: World,
    say: Callable[[str], None] = lambda line: None,
    placed: Placement | None = None,
) -> Run:
    """The run at its start, rank 0's first weights on all ranks; collective. say prints a line for the user.

    placed: where this rank computes, if that was found out before. Raises UsageError for a model, a device or an
    exchange that cannot be, MismatchError where the ranks' code differs.
    """
    run = unplaced_run(settings, dataset, world)
    placed = placed or place(world, settings.device, settings.precision)
    if placed.line:
        say(placed.line)
    if placed.ordinal is None:
        return on_cpu(run)
    say("preparing the GPU's kernels; the first time on a machine they are compiled, in a minute or less")
    return on_gpu(run, Cuda(placed.ordinal, say), placed.shared)


def unplaced_run(settings: Config, dataset: Dataset, world: World) -> Run:
    """The run before it is known where it computes: on_cpu or on_gpu gives it its exchange and its engine."""
    with world.together():
        model, specs = build_network(settings.model, dataset.image_shape, dataset.classes)
        try:
            parameters = Parameters(specs, WIRES[settings.wire].dtype)  # no use in sums finer than what is summed
        except (MemoryError, ValueError) as error:
            raise UsageError(f"--model {settings.model} has {count(specs):,} parameters: {error}") from None
    agree_on_code(world, settings.model, settings.data)
    world.agree("the model", parameters.layout(), "give all hosts the same code")
    parameters.initialize(settings.seed)
    world.comm.Bcast(parameters.vector)
    optimizer = OPTIMIZERS[settings.optimizer](parameters.size, parameters.vector.dtype, settings.lr)
    exact = "float64" if settings.wire == "float64" else "float32"
    probe = WireProbe(settings.wire, lambda size: choose(world, size, exact))
    return Run(settings, dataset, model, parameters, optimizer, world, None, probe, CPU)


def on_cpu(run: Run) -> Run:
    """Let the run compute on this rank's cores; collective. Raises UsageError."""
    settings = run.config
    with run.world.together():
        if settings.exchange in ("nccl", "cuda-mpi"):
            raise UsageError(f"--exchange {settings.exchange} joins GPUs, but these ranks compute on the CPU: use auto")
    with run.world.together():  # collective inside too, but where it raises it does so on all ranks
        run.exchange = choose(run.world, run.parameters.size, settings.wire, settings.exchange)
    compile_kernels(run)
    return run


def on_gpu(run: Run, device: Any, shared: bool) -> Run:
    """Let the run compute on a device (a kernels.cuda.Cuda); collective. shared: some GPU has several ranks.

    Raises UsageError.
    """
    settings, world = run.config, run.world
    with world.together():
        if settings.wire == "float64":
            raise UsageError("--wire float64 computes in float64, which only the CPU does: use --device cpu")
    gpu = Gpu(device, settings.precision)
    with world.together():
        run.exchange = choose_on_gpu(world, gpu, run.parameters.size, settings.wire, settings.exchange, shared)
    run.engine = GpuEngine(gpu, run, run.exchange)
    with one_of_a_host_first(world):
        compile_wire(run.exchange.wire)
        run.engine.gradient(run, np.zeros(1, np.int64), global_batch=1, step=0, probing=True)
    return run


def compile_kernels(run: Run) -> None:
    """Call what a step calls, on two images, so that what is not in the cache is compiled; collective.

    Raises UsageError for a model whose layers do not give what they should.
    """
    parameters, data = run.parameters, run.dataset
    in_turn = run.world.local.allreduce(not CACHE.holds_some()) > 0
    with run.world.together(), one_of_a_host_first(run.world) if in_turn else contextlib.nullcontext():
        images, labels = data.train_images[:2], data.train_labels[:2]
        context = Context(training=True, samples=np.arange(len(labels)))
        local_gradient(checked(run.model), parameters, images, labels, context, 1)
        parameters.gradient[...] = 0
        value, gradient = np.zeros((2, 1), parameters.vector.dtype)
        type(run.optimizer)(1, parameters.vector.dtype, 1.0).step(value, gradient, 1)
        run.engine.checksum(run)
        compile_wire(run.exchange.wire)


@contextlib.contextmanager
def one_of_a_host_first(world: World) -> Iterator[None]:
    """Run a part on one rank of each host, then on the others: what one has compiled, the others find in the cache."""
    if world.local_rank != 0:
        world.wait(on_host=True)
    try:
        yield
    finally:  # after a failure, too, the others' turn comes
        if world.local_rank == 0:
            world.wait(on_host=True)


def compile_wire(wire: Wire) -> None:
    """Call what an exchange calls."""
    numbers, message = np.zeros(BLOCK, wire.dtype), np.zeros(wire.nbytes(BLOCK), np.uint8)
    wire.encode(numbers, message)
    wire.sum_and_encode(numbers, 0, 2, np.tile(message, 2), 0, len(message), message)
    wire.decode(message, numbers)
    wire.first_bad(numbers)
