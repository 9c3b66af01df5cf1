"""The training command's work: from settings to a finished run in its folder.

What a run is made of is put together by build.py, its steps and epochs come from loop.py as records; here they are
written down, told to people, and saved.
"""

from __future__ import annotations

import os
import platform
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distconv import __version__, config, errors
from distconv.comm.placement import Placement, place
from distconv.comm.world import World, blas_threads
from distconv.config import Config
from distconv.formatting import loss, percent, plural
from distconv.kernels.compiled import CACHE
from distconv.nn.normalization import takes_statistics
from distconv.nn.schedules import Schedule
from distconv.nn.summary import norms_of_one_number
from distconv.run import checkpoint as files
from distconv.run.build import build_run
from distconv.run.checkpoint import Checkpoint
from distconv.run.ending import conclude, finish, show_report
from distconv.run.folder import EVENTS, check_folder, held_folder, make_ready
from distconv.run.initial_weights import load_initial_weights
from distconv.run.loading import CHECKPOINT_ENDING, load_dataset
from distconv.run.log import RunLog
from distconv.run.loop import EpochRecord, Record, StepRecord, StopRecord, logged
from distconv.run.loop import train as records
from distconv.run.memory import tell_memory
from distconv.run.run import Run
from distconv.run.saver import Saver
from distconv.run.stopping import StopRequest
from distconv.run.tensorboard import EventFile
from distconv.run.trace import Trace
from distconv.run.trace_file import check_trace

SHOWN = {"train": "training", "ema_test": "test (averaged)", "ema_validation": "validation (averaged)"}  # to people


def train(
    settings: Config, world: World, stop: StopRequest, log: RunLog | None = None, placed: Placement | None = None
) -> int:
    """The whole run on this rank; returns the exit code. placed: where it computes, if that is known already."""

    agree_on_settings(settings, world)
    with world.together():
        check_settings(settings, world)
    log = log or RunLog(world.rank == 0)
    if final := check_folder(settings, world):  # before anything is fetched or compiled
        log.say("this run is finished: nothing is left to do, and nothing was changed")
        return conclude(final, settings, Path(settings.out), log)
    placed = placed or place(world, settings.device, settings.precision)
    if settings.trace:
        world.on_rank_0(lambda: check_trace(Path(settings.trace), Path(settings.out) if settings.out else None))
    CACHE.say = log.say
    dataset, data_name = load_dataset(settings.data, world, log.say, settings.limit_train, settings.validation)
    world.at("compile")
    run = build_run(settings, dataset, world, log.say, placed)
    world.at("start")
    with held_folder(settings, world, log.say) as out:
        return train_in(out, run, data_name, log, stop)


def agree_on_settings(settings: Config, world: World) -> None:
    """Raise MismatchError on all ranks where they have other settings, or another version, than one another."""
    world.agree("the command line or the version", f"{__version__} {settings.toml()}", "start all ranks alike")


def train_in(out: Path, run: Run, data_name: str, log: RunLog, stop: StopRequest) -> int:
    """The training itself, in the folder that is this job's alone; returns the exit code."""

    checkpoint = resume(run, out, log)
    with run.world.together():
        if run.world.rank == 0:
            make_ready(out, run.config, checkpoint, log.say)
        log.open(out / "metrics.jsonl", run.step)
        if run.world.rank == 0 and run.config.tensorboard:
            log.events = EventFile(out / EVENTS, run.step, run.config.toml())
    run.world.error_folder = out / "errors"
    introduce(run, out, data_name, checkpoint, log)

    saver = Saver(run, out / "checkpoints", data_name, log)
    if run.config.resume not in config.RESUME:
        saver.save()  # for a start after an accident, which must not begin with that file again
    trace = Trace(run, saver, log) if run.config.trace else None
    stop.can_save = True
    steps = records(run, stop.requested, saver.is_due, ahead=True)
    try:
        code = follow(trace.watch(steps) if trace else steps, run, saver, out, log)
    except errors.DivergedError as failure:
        saver.set_aside(failure.bad_from)
        log.close()  # the last steps are what people will look for
        show_report(run, out, log, str(failure))
        raise
    code = finish(run, out, log) if code == 0 else code
    if trace:
        trace.close()
    return code


def follow(records: Iterator[Record], run: Run, saver: Saver, out: Path, log: RunLog) -> int:
    """Go through a run's records: write them down, tell people, save; returns the exit code."""

    settings = run.config
    for record in records:
        fields = logged(record)
        log.write(record.event, **fields)
        if isinstance(record, StepRecord):
            log.progress(
                record.step, run.steps, record.epoch, settings.epochs, record.train_loss, record.images_per_second
            )
            if record.skipped:
                log.say(f"step {record.step}: skipped, the gradient was not finite")
            if record.agreed and saver.is_due():
                saver.save()
        elif isinstance(record, EpochRecord):
            log.say(
                f"epoch {record.epoch}/{settings.epochs}: loss {loss(record.train_loss)}, {record.metric} "
                + "".join(f"{percent(score)} {SHOWN.get(part, part)}, " for part, score in record.scores.items())
                + f"{record.images_per_second:,.0f} images/s"
            )
            saver.save()
        elif isinstance(record, StopRecord):
            there = "there" if saver.save() else "the last good checkpoint"
            # An ensemble says it once, for all.
            how = "" if log.prefix else f"; {same_command(settings, out)} goes on from {there}"
            log.say(f"stopped on request after step {record.step}{how}")
            log.close()
            show_report(run, out, log)
            return errors.STOPPED
    return 0


def same_command(settings: Config, out: Path) -> str:
    """What to type so that a run goes on, for people."""
    resume = "" if settings.resume == "auto" else " --resume auto"  # others are for a folder that is new
    return f"the same command with --out {shlex.quote(str(out))}{resume}"


def check_settings(settings: Config, world: World) -> None:
    """What can be known only with the ranks and the machine at hand. Raises UsageError."""
    check_resume(settings.resume)
    if settings.step_size < world.size:
        raise errors.UsageError(
            f"--batch-size {settings.batch_size} with {world.size} ranks: every rank needs at least one image of the "
            f"global batch; use --batch-size {world.size} or more, or fewer ranks"
        )
    if settings.shards and settings.shards < world.size:
        raise errors.UsageError(
            f"--shards {settings.shards} with {world.size} ranks: every rank needs a shard of its own; use "
            f"{settings.shards} ranks or fewer, or more shards"
        )
    if settings.shards > settings.step_size:
        raise errors.UsageError(
            f"--shards {settings.shards} with --batch-size {settings.batch_size}: every shard needs an image of the "
            f"global batch; use --shards {settings.step_size} or fewer"
        )


def check_resume(given: str) -> None:
    """Raise UsageError where --resume names what no run can go on from, though it may have weights to start with."""
    if given in config.RESUME or given.endswith(CHECKPOINT_ENDING) or not os.path.exists(given):  # noqa: PTH110
        return  # what does not exist is found out when it is read; pathlib raises for names that cannot be
    going_on = f"go on with that run by --out {given}, or " if os.path.isdir(given) else ""  # noqa: PTH112
    raise errors.UsageError(
        f"--resume {given} is no checkpoint (*{CHECKPOINT_ENDING}) to go on from: {going_on}start a new run from its "
        f"weights by --init {given}"
    )


def resume(run: Run, out: Path, log: RunLog) -> Checkpoint | None:
    """Bring all ranks to the checkpoint that --resume asks for, read by rank 0, or a new run to the weights of --init.

    Returns the checkpoint, on rank 0.
    """

    found, position = None, None
    with run.world.together():
        if run.world.rank == 0 and run.config.resume != "never":
            if run.config.resume == "auto":
                found, passed_over = files.newest_good(out / "checkpoints")
                for reason in passed_over:
                    log.say(f"passed over: {reason}")
            else:
                found = files.load_checkpoint(Path(run.config.resume))
            if found:
                for change in files.check_same_run(found, run.config, run.data.digest):
                    log.say(f"resumed with a change: {change}")
                found.fill(run.parameters.by_slot(run.vectors()))
                position = dict(found.position)
    position = run.world.comm.bcast(position)
    if position:
        for vector in run.vectors().values():
            run.world.comm.Bcast(vector)
        run.restore(position, run.vectors())
    else:
        load_initial_weights(run, log.say)
    return found


def introduce(run: Run, out: Path, data_name: str, checkpoint: Checkpoint | None, log: RunLog) -> None:
    """The start line, the memory that it will take, and the start event."""
    world, data, settings, exchange, device = (
        run.world, run.data, run.config, run.replica.exchange, run.replica.kernels.name
    )  # fmt: skip
    threads = blas_threads()
    wire = f"{settings.wire} on the wire"
    if settings.is_exact:
        wire = f"{settings.shards} shards, which give the same bits on 1 to {settings.shards} ranks, {wire}"
    elif settings.shards:
        wire = f"{settings.shards} shards, {wire}"
    where = f"{device} in {settings.precision}"
    if device == "cpu":
        where = f"cpu with {plural(threads, 'BLAS thread')} a rank"
    log.say(
        f"distconv {__version__}: {plural(world.size, 'rank')} on {plural(world.hosts, 'host')}, {where}, "
        f"{world.library} | "
        f"{settings.model}, {run.parameters.trained_size:,} parameters, {wire} ({exchange.how}) | "
        f"{data_name}, {data.size('train'):,} training and {data.size('test'):,} test images"
    )
    _tell_of_batch_norm(run, log)
    optimizer = run.replica.optimizer
    peak = optimizer.lr.lr if isinstance(optimizer.lr, Schedule) else optimizer.rate(1)
    images = min(settings.step_size, data.size("train"))
    if isinstance(optimizer.lr, Schedule) or settings.scale_lr != "none" or settings.accumulate > 1:
        log.say(
            f"{plural(run.steps, 'step')} of {plural(images, 'image')}; learning rate {optimizer.rate(1):.3g} in the "
            f"first, up to {peak:.3g}, {optimizer.rate(run.steps):.3g} in the last"
        )
    if checkpoint:
        log.say(f"going on from {checkpoint.path}, after step {run.step:,} of {run.steps:,}")
    log.write(
        "start",
        resumed_step=run.step,
        ranks=world.size,
        hosts=world.hosts,
        hostnames=world.comm.allgather(socket.gethostname()),
        device=device,
        precision=settings.precision,
        blas_threads=threads,
        wire=settings.wire,
        shards=settings.shards,
        exchange=exchange.how,
        bus_bytes=exchange.bus_bytes,  # of a step, between a GPU and its host
        model=settings.model,
        parameter_count=run.parameters.trained_size,
        data=data_name,
        data_sha256=data.digest,
        memory_bytes=tell_memory(run, log.say),
        train_images=data.size("train"),
        batch_size=settings.step_size,
        test_images=data.size("test"),
        steps=run.steps,
        out=str(out),
        versions={
            "distconv": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "mpi": world.library,
        },
    )


def _tell_of_batch_norm(run: Run, log: RunLog) -> None:
    """What the statistics of batch norm are taken from, where that may surprise."""
    settings, size, model = run.config, run.world.size, run.replica.model
    if size > 1 and not settings.shards and takes_statistics(model):
        log.say(
            "batch norm takes its statistics from the images of one rank, so another number of ranks trains another "
            f"model; with --shards {size}, 1 to {size} ranks train the same one"
        )
    fewest = min(run.shards.sizes(min(settings.step_size, run.data.size("train")))) // settings.accumulate
    if fewest <= 1 and (names := norms_of_one_number(model, run.data.image_shape)):
        log.say(
            f"the batch norm of {names[0]} sees one image at a time, and of it one number a channel, so it gives the "
            "same for every image, and no layer before it learns: use a larger --batch-size, or fewer ranks, shards "
            "or parts of --accumulate"
        )
