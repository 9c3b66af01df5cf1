"""A run put together from its settings: model, parameters, optimizer, and where it computes and exchanges."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import numpy as np

from distconv.comm.choose import choose
from distconv.comm.exact import ALL_WIRES
from distconv.comm.exchange import MOST_SUMS, Exchange, step_header
from distconv.comm.on_cpu import DeviceExchange, OnCpu
from distconv.comm.on_gpu import choose_on_gpu, first_problem
from distconv.comm.placement import Placement, place
from distconv.comm.probe import WireProbe
from distconv.comm.world import World
from distconv.config import CLASSIFY, LR_BATCH, Config
from distconv.data.augment import Augmentation, Augmented, named_augmentation
from distconv.data.data import Data
from distconv.data.shard import Shards, batches
from distconv.errors import UsageError
from distconv.factory import call_factory
from distconv.kernels.compiled import CACHE
from distconv.kernels.cpu.device import Cpu
from distconv.kernels.gpu.arithmetic import Gpu
from distconv.kernels.gpu.device import Cuda
from distconv.kernels.interface import Kernels
from distconv.nn.checked import checked
from distconv.nn.layers import Context, Layer, is_ours, kind_of
from distconv.nn.layerwise import ALL_OPTIMIZERS
from distconv.nn.networks import build_network
from distconv.nn.optimizers import EMA, Optimizer
from distconv.nn.parameters import Parameters, Shape, count, is_shape, is_whole, is_within
from distconv.nn.schedules import LR_RULES, Schedule
from distconv.run.loop import StepRecord
from distconv.run.replica import Replica
from distconv.run.run import Run
from distconv.run.same_code import agree_on_code
from distconv.tasks.classify import Classification
from distconv.tasks.task import Task


def build_run(
    settings: Config,
    data: Data,
    world: World,
    say: Callable[[str], None] = lambda line: None,
    placed: Placement | None = None,
    *,
    model: Layer | None = None,
    device: Any = None,
) -> Run:
    """The run at its start, rank 0's initial weights on all ranks; collective. say prints a line for the user.

    model: in place of what the settings name; the same on all ranks. placed: where this rank computes, if that was
    found out before. device: a GPU (kernels.gpu.device.Cuda) that is there already. Raises UsageError for a model, a
    device or an exchange that cannot be, MismatchError where the ranks' code differs.
    """
    with world.together():
        found = check_data(settings.data, data)
    world.agree("the data set", found, "have the data's sizes and shapes be the same on all ranks")
    with world.together():
        task = named_task(settings.task, settings.label_smoothing)
        optimizer = named_optimizer(settings, batches(data.size("train"), settings.step_size))
        if settings.patience and not data.size("validation"):
            raise UsageError(
                "--patience needs a validation set, as the test set must not decide when to stop: hold one out by "
                "--validation 5000, say"
            )
        if settings.augment:
            data = augmented(data, settings.augment)
    model, parameters = build_model(settings, data, task, world, model)
    if device is None:
        placed = placed or place(world, settings.device, settings.precision)
        device = open_gpu(placed, say)
    shared = placed is not None and placed.shared
    kernels: Kernels = Cpu(parameters.vector.dtype, in_order=settings.is_exact)
    if device is not None:
        check_for_gpu(settings, optimizer, world)
        apart = is_ours(model)  # a user's layer may look at gradients before the backward pass is over
        kernels = Gpu(device, settings.precision, apart)
    shards = Shards(settings.shards or world.size, world.size, world.rank)
    exchange = choose_exchange(settings, kernels, parameters.size, world, shared, shards)
    probe = make_probe(settings, exchange, parameters.size, world)
    replica = Replica(
        kernels, model, parameters, task, data, optimizer, exchange, settings, shards,
        lambda problem: first_problem(world, problem),
    )  # fmt: skip
    run = Run(settings, data, task, replica, world, probe, shards)
    compile_kernels(run)
    return run


def open_gpu(placed: Placement, say: Callable[[str], None]) -> Cuda | None:
    """The GPU of this rank, if it has one."""
    if placed.line:
        say(placed.line)
    if placed.ordinal is None:
        return None
    say("preparing the GPU's kernels; the first time on a machine they are compiled: a second or two for each shape")
    return Cuda(placed.ordinal, say)


def check_data(name: str, data: Data) -> str:
    """The sizes and shapes of the data, as text. Raises UsageError for such as no data can have."""
    if not is_shape(data.image_shape):
        raise UsageError(
            f"--data {name} has the image_shape {data.image_shape!r}, but whole numbers from 1 were expected"
        )
    if not is_whole(data.classes) or data.classes < 1:
        raise UsageError(f"--data {name} has {data.classes!r} classes, but a whole number from 1 was expected")
    sizes = {part: data.size(part) for part in ("train", "test", "validation")}
    for part, size in sizes.items():
        least = 0 if part == "validation" else 1
        if not is_whole(size) or size < least:
            raise UsageError(
                f"--data {name} gives {size!r} as the size of {part}, but a whole number from {least} was expected"
            )
    return f"{sizes}, {data.classes} classes of {data.image_shape}"


def named_task(name: str, label_smoothing: float = 0.0) -> Task:
    """The task that --task names. Raises UsageError."""
    if name != CLASSIFY and label_smoothing:
        raise UsageError(f"--label-smoothing is for --task {CLASSIFY}: {name} has a loss of its own")
    task: Task = Classification(label_smoothing) if name == CLASSIFY else call_factory(name)
    for part in ("sums", "metric", "output_shape", "blind_loss", "gradient", "evaluate"):
        if getattr(task, part, None) is None:
            raise UsageError(f"--task {name} returned a {type(task).__name__}, which has no {part}: see tasks/task.py")
    if isinstance(task, type):
        raise UsageError(f"--task {name} returned the class {task.__name__}, but an object of it was expected")
    sums, metric = task.sums, task.metric
    if not isinstance(sums, tuple | list) or not all(isinstance(part, str) and part.isidentifier() for part in sums):
        raise UsageError(f"--task {name} has the sums {sums!r}, but a tuple of words was expected, the loss first")
    taken = {field.name for field in dataclasses.fields(StepRecord)}
    if not 1 <= len(sums) <= MOST_SUMS or len({*sums} | taken) < len(sums) + len(taken):
        raise UsageError(
            f"--task {name} has the sums {sums!r}, but 1 to {MOST_SUMS} of different names, none of them one of "
            f"{', '.join(sorted(taken))}, were expected"
        )
    if not isinstance(metric, str) or not metric.isidentifier() or metric in ("loss", "images"):
        raise UsageError(f"--task {name} has the metric {metric!r}, but a word like accuracy was expected")
    return task


def check_task(name: str, task: Task, data: Data) -> Shape | None:
    """The shape of outputs that a task wants for these data. Raises UsageError where it, or the blind loss, is none."""
    wanted, loss = task.output_shape(data), task.blind_loss(data)
    if wanted is not None and not is_shape(wanted):
        raise UsageError(f"--task {name} has the output_shape {wanted!r}, but a tuple of whole numbers was expected")
    if not is_number(loss):
        raise UsageError(f"--task {name} has the blind_loss {loss!r}, but a number was expected")
    return wanted


def named_optimizer(settings: Config, steps_per_epoch: int) -> Optimizer:
    """The optimizer that --optimizer names, with the learning rates of the run. Raises UsageError."""
    name, steps = settings.optimizer, settings.epochs * steps_per_epoch
    lr = learning_rate(settings, steps_per_epoch)
    if name in ALL_OPTIMIZERS:
        optimizer = ALL_OPTIMIZERS[name](lr, settings.weight_decay)
    elif settings.weight_decay or callable(lr):  # it is called with a number, and may multiply it
        given = "--weight-decay" if settings.weight_decay else "--schedule, or --warmup-epochs,"
        raise UsageError(f"{given} is for the optimizers that are here: {name} must see to its own")
    else:
        optimizer = call_factory(name, lr, steps)
    if not isinstance(optimizer, Optimizer):
        raise UsageError(f"--optimizer {name} returned {kind_of(optimizer)}, but an Optimizer was expected")
    for slot, whose in ((EMA, "--ema's"), ("value", "the weights' own")):
        if slot in optimizer.slots:
            raise UsageError(f"--optimizer {name} has the slot {slot}, which is the name of {whose}: use another one")
    rates = [getattr(optimizer, "lr", None) and optimizer.rate(t) for t in (1, steps)]
    if not all(is_within(rate, 0, sys.float_info.max) for rate in rates):
        raise UsageError(
            f"--optimizer {name} has the learning rates {rates} in the first and the last step: numbers "
            "from 0 were expected"
        )
    return optimizer


def learning_rate(settings: Config, steps_per_epoch: int) -> float | Schedule:
    """A number, or where it changes, what gives it for a step. Raises UsageError."""
    if settings.warmup_epochs >= settings.epochs:
        raise UsageError(
            f"--warmup-epochs {settings.warmup_epochs:g} with --epochs {settings.epochs}: a warm-up that ends before "
            "the run was expected"
        )
    lr = settings.lr * LR_RULES[settings.scale_lr](settings.step_size / LR_BATCH)
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    if settings.schedule == "constant" and not warmup:
        return lr
    return Schedule(lr, settings.schedule, settings.epochs * steps_per_epoch, warmup)


def augmented(data: Data, name: str) -> Data:
    """The data with training images changed as --augment names it. Raises UsageError."""
    change = named_augmentation(name)
    if isinstance(change, Augmentation) and (shape := getattr(data, "label_shape", None)):
        raise UsageError(
            f"--augment {name} would change images and leave their labels of shape {shape} as they are: change both "
            "in a Data of your own"
        )
    return Augmented(data, change)


def build_model(
    settings: Config, data: Data, task: Task, world: World, model: Layer | None
) -> tuple[Layer, Parameters]:
    """The model, and its parameters with rank 0's initial weights; collective."""
    with world.together():
        wanted = check_task(settings.task, task, data)
        model, specs = build_network(settings.model, data.image_shape, data.classes, wanted, model)
        try:
            parameters = Parameters(specs, ALL_WIRES[settings.wire].dtype)  # no finer than what is summed
        except (MemoryError, ValueError) as error:
            raise UsageError(f"--model {settings.model} has {count(specs):,} parameters: {error}") from None
    agree_on_code(world, settings.model, settings.data, settings.task, settings.optimizer, settings.augment)
    world.agree("the model", parameters.layout(), "give all hosts the same code")
    with world.together():
        parameters.initialize(settings.seed, data)
    world.comm.Bcast(parameters.vector)
    return model, parameters


def check_for_gpu(settings: Config, optimizer: Optimizer, world: World) -> None:
    """Raise UsageError on all ranks for what only a CPU can do; collective."""
    with world.together():
        if settings.wire == "float64":
            raise UsageError("--wire float64 computes in float64, which only the CPU does: use --device cpu")
        if optimizer.kernel is None:
            kind = type(optimizer).__name__
            raise UsageError(f"the optimizer {kind} has a formula of its own, which only the CPU has: use --device cpu")


def choose_exchange(
    settings: Config, kernels: Kernels, size: int, world: World, shared: bool, shards: Shards
) -> DeviceExchange:
    """The exchange that the settings name, where the kernels compute; collective. shared: some GPU has several ranks.

    Raises UsageError.
    """
    with world.together():
        if kernels.name == "cpu" and settings.exchange in ("nccl", "cuda-mpi"):
            raise UsageError(f"--exchange {settings.exchange} joins GPUs, but these ranks compute on the CPU: use auto")
    with world.together():  # collective inside too, but where it raises it does so on all ranks
        wire, kind, header = settings.wire, settings.exchange, step_header(shards.most)

        def connect() -> Exchange:
            return choose(world, size, wire, kind, header, settings.seed, shards.count)

        if isinstance(kernels, Gpu):
            return choose_on_gpu(
                world, kernels, size, wire, kind, shared, connect, len(shards.own) if settings.is_exact else 1
            )
        return OnCpu(connect())


def make_probe(settings: Config, exchange: DeviceExchange, size: int, world: World) -> WireProbe:
    """What looks at the wire of a gradient (size,); collective."""
    floats = "float64" if settings.wire == "float64" else "float32"

    def exact(n: int) -> Exchange:
        return choose(world, n, "int32", contributions=settings.shards)

    return WireProbe(exchange.wire, size, lambda n: choose(world, n, floats), exact if settings.is_exact else None)


def compile_kernels(run: Run) -> None:
    """Call what a step calls, so that what is not in the cache is compiled; collective.

    Raises UsageError for a model whose layers do not give what they should.
    """
    replica, world, cpu = run.replica, run.world, run.replica.kernels.name == "cpu"
    in_turn = not cpu or world.local.allreduce(not CACHE.holds_some()) > 0
    with world.together(), one_of_a_host_first(world) if in_turn else contextlib.nullcontext():
        replica.exchange.wire.warm_up()
        model = checked(replica.model) if cpu else replica.model
        if cpu:
            samples = np.arange(min(2, run.data.size("train")))
            context = Context(training=True, samples=samples, kernels=replica.kernels)
            batch = run.data.batch("train", samples, context)
            sums = run.task.gradient(model, replica.values, replica.grads, batch, context)
            check_sums("gradient", sums, len(run.task.sums))
            value, gradient, *state = np.zeros((2 + len(replica.slots), 1), replica.vector.dtype)
            replica.optimizer.step(value, gradient, replica.optimizer.numbers(1), *state)
            replica.checksum()
            replica.kernels.clip([gradient], 1.0, replica.mailbox.bad)
            if run.config.ema:
                replica.kernels.average(value, gradient, (0.5,), replica.mailbox.bad)
        else:
            replica.share(0, np.zeros(1, np.int64), 1)
        # An epoch's end would be late to learn of faults, and a rank that compiles many kernels there seems to hang.
        at_rest = Context(training=False, samples=replica.device.upload(np.zeros(1, np.int32)), kernels=replica.kernels)
        batch = run.data.batch("test", at_rest.samples, at_rest)
        check_sums("evaluate", run.task.evaluate(model, replica.values, batch, at_rest), 2)


def check_sums(method: str, found: Any, count: int) -> None:
    """Raise UsageError where these are not so many sums that a task gave."""
    if not isinstance(found, tuple | list) or len(found) != count or not all(map(is_number, found)):
        raise UsageError(f"the task's {method} gave {found!r}, but a tuple of {count} numbers was expected")


def is_number(found: Any) -> bool:
    """Whether this is one real number, or an array that holds one."""
    return isinstance(found, Real) or (isinstance(found, np.ndarray) and found.size == 1)


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
