"""The synchronous step and the epoch: a generator of records. It prints nothing and knows no files.

Each rank computes the gradient of its shard as a sum over its samples divided by the global batch, so that the exchange
is a plain sum and every sample weighs the same, however unevenly the batch divides. All ranks then make the same step.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from distconv.comm.exchange import MOST_SUMS, Headers
from distconv.data.shard import epoch_order
from distconv.errors import DistconvError, DivergedError
from distconv.formatting import plural
from distconv.nn.optimizers import EMA
from distconv.nn.parameters import Parameters
from distconv.run import agreement
from distconv.run.noise import MOMENTS, estimate, moments, scale_of
from distconv.run.run import Run

MOST_SKIPPED = 10  # steps in a row without a finite gradient
NOT_FINITE = "a gradient that is not finite"
MOST_FAR = 5  # steps in a row whose loss is not finite, or more than FAR times that of the start
FAR = 10
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class StepRecord:
    """One step. train_loss is the mean over the global batch, with dropout; seconds and bytes are rank 0's own.

    compute: its gradient; wait: for the slowest rank, or for a core that several ranks share; exchange: the rest of the
    exchange, in which all ranks take part; wire_seconds_float32: such an exchange on a float32 wire, when last tried.
    """

    event: ClassVar[str] = "step"
    step: int
    epoch: int
    train_loss: float
    learning_rate: float
    others: dict[str, float] = field(metadata={"log": False})  # the means of the task's other sums, by name
    images_per_second: float
    compute_seconds: float
    exchange_seconds: float
    wait_seconds: float
    wire_bytes: int
    wire_seconds_float32: float
    slowest_rank: int
    skipped: bool
    last_of_epoch: bool = field(metadata={"log": False})
    agreed: bool = field(metadata={"log": False})  # all ranks have been seen to hold the same state, which may be saved


@dataclass(frozen=True)
class EpochRecord:
    """One epoch. The scores are of the task's metric, without dropout, on the first eval_samples of each part; those of
    the average of the weights, where one is kept, are named ema_test and so on.

    The wire's health is that of a gradient at the epoch's end: see WireHealth. noise_scale: of the gradients of the
    epoch, in samples; noise_scale_error: its standard error, as a share of it; see noise.py. busy_seconds: of each
    rank, the mean time of a step between two exchanges.
    """

    event: ClassVar[str] = "epoch"
    step: int
    epoch: int
    train_loss: float
    metric: str = field(metadata={"log": False})
    scores: dict[str, float] = field(metadata={"log": False})  # by part
    images_per_second: float
    largest_gradient: float
    flushed_share: float
    wire_error: float
    noise_scale: float
    noise_scale_error: float
    busy_seconds: list[float]
    parameters_sha256: str


@dataclass(frozen=True)
class StopRecord:
    """Some rank was asked to stop; all have stopped after the same step."""

    event: ClassVar[str] = "stop"
    step: int


Record = StepRecord | EpochRecord | StopRecord


def logged(record: Record) -> dict[str, Any]:
    """What metrics.jsonl holds of a record."""
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.metadata.get("log", True)}
    scores: Mapping[str, float] = getattr(record, "scores", {})
    fields |= getattr(record, "others", {})
    return fields | {f"{part}_{record.metric}": score for part, score in scores.items()}  # type: ignore[union-attr]


def train(
    run: Run,
    stop_requested: Callable[[], bool],
    save_requested: Callable[[], bool] = lambda: False,
    ahead: bool = False,
) -> Iterator[Record]:
    """Train from the run's position to its end, or until a rank is asked to stop.

    save_requested: whether this rank wants a state that may be saved; then all ranks look whether they agree on it.
    ahead: a rank that is alone may begin the next step before it gives the record of the last one, so that its GPU need
    not wait for who reads the records. Between records the run's position and vectors are those of a checkpoint, except
    between the last step of an epoch and the record of the epoch, and with `ahead`, where a step's record says that it
    is not agreed. Raises DivergedError, ReplicasDifferError.
    """
    run.checksum, run.good_until, stopping = run.replica.checksum(), run.step - 1, False
    if run.step < run.steps:
        run.probe.time()
        run.exchanged = time.perf_counter()  # to come so far is no part of a step
    while run.step < run.steps and not stopping and not run.out_of_patience:
        epoch, first = divmod(run.step, run.steps_per_epoch)
        order = epoch_order(run.config.seed, epoch, run.data.size("train"))
        seconds, images = 0.0, 0
        for batch in range(first, run.steps_per_epoch):
            began = time.perf_counter()
            record, stopping = _step(run, order, epoch, batch, stop_requested(), save_requested(), ahead)
            seconds += time.perf_counter() - began
            images += len(order[batch * run.config.step_size : (batch + 1) * run.config.step_size])
            yield record
            if stopping and not record.last_of_epoch:
                break
        else:
            yield _end_of_epoch(run, epoch, images / seconds)
    if stopping:
        yield StopRecord(run.step)
    elif run.skipped or run.diverging:  # the weights of its end were not saved, and nobody could use them
        raise _diverged(run, NOT_FINITE * (run.skipped > 0))


def _step(
    run: Run, order: NDArray[np.int64], epoch: int, batch: int, stop: bool, save: bool, ahead: bool
) -> tuple[StepRecord, bool]:
    """One synchronous step of all ranks: its record, and whether any rank was asked to stop."""
    world, replica, step, batch_size = run.world, run.replica, run.step, run.config.step_size
    mine = run.shards.samples(order, batch, batch_size)
    global_batch = len(order[batch * batch_size : (batch + 1) * batch_size])
    last_of_epoch = batch + 1 == run.steps_per_epoch
    following = None  # the epoch's last batch may be of another size, and where the run stops, nothing follows
    if ahead and world.size == 1 and not (stop or save) and batch + 2 < run.steps_per_epoch:
        following = run.shards.samples(order, batch + 1, batch_size)

    world.at("compute", step)
    began = time.perf_counter()
    sums = replica.compute(step, mine, global_batch, following)
    world.at("exchange")
    ready = time.perf_counter()
    told = (step, len(mine), 0, math.nan, -1, stop, save, run.checksum, run.corrupted, ready - run.exchanged)
    header, waited = np.array(told, replica.header), replica.exchange.waited
    header["sums"][: len(sums), : sums.shape[1]] = sums
    headers = replica.sum(step, header)
    run.exchanged = time.perf_counter()
    wait = max(float(headers["busy_seconds"].max() - header["busy_seconds"]), replica.exchange.waited - waited)
    _check_headers(run, headers, global_batch)
    if batch:  # before the first step of an epoch, the last one was evaluated
        run.note_busy(headers["busy_seconds"])

    run.step += 1
    run.corrupted = replica.checksum() != run.checksum
    good = replica.update(step)
    run.checksum = replica.checksum()
    if good and replica.looks:
        _note_noise(run, headers, global_batch)
    totals = headers["sums"].reshape(-1, MOST_SUMS).cumsum(axis=0)[-1]  # shard by shard, so in the same order always
    _note_loss(run, good, float(totals[0]), global_batch, headers)
    stopping, asked = bool(headers["stop"].any()), bool(headers["save"].any())
    agreed = not last_of_epoch and (stopping or asked)
    if agreed:
        agreement.agree(run)
    record = StepRecord(
        step=run.step,
        epoch=epoch + 1,
        train_loss=float(totals[0]) / global_batch,
        learning_rate=replica.optimizer.rate(run.step),
        others={name: float(total) / global_batch for name, total in zip(run.task.sums[1:], totals[1:], strict=False)},
        images_per_second=global_batch / (time.perf_counter() - began),
        compute_seconds=ready - began,
        exchange_seconds=max(0.0, run.exchanged - ready - wait),
        wait_seconds=wait,
        wire_bytes=replica.exchange.bytes_sent,
        wire_seconds_float32=run.probe.seconds,
        slowest_rank=int(np.argmax(headers["busy_seconds"])),
        skipped=not good,
        last_of_epoch=last_of_epoch,
        agreed=agreed,
    )
    return record, stopping


def _check_headers(run: Run, headers: Headers, global_batch: int) -> None:
    """Whether all ranks have made the same step from the same state."""
    if np.any(headers["step"] != run.step) or headers["samples"].sum() != global_batch:
        raise DistconvError(f"the ranks are not at the same step: {headers['step'].tolist()}; this is a bug")
    agreement.compare(run.step, headers["checksum"].tolist(), headers["changed"].tolist())


def _note_loss(run: Run, updated: bool, loss: float, global_batch: int, headers: Headers) -> None:
    """Keep the sums of the epoch, and count the steps in a row that were skipped, or whose loss is out of bounds.

    Raises DivergedError where these are too many.
    """
    mean = loss / global_batch
    finite = math.isfinite(mean)
    if finite and not run.first_loss:
        run.first_loss = mean
    far = not finite or mean > FAR * _loss_of_the_start(run)
    if not far:
        run.good_until = run.step - 1
    if updated:
        run.loss_sum += loss
        run.samples += global_batch
        run.skipped, run.diverging = 0, run.diverging + 1 if far else 0
    else:
        run.skipped += 1
    if run.skipped == MOST_SKIPPED:
        raise _diverged(run, f"{NOT_FINITE} (last {_who_is_bad(headers['bad_at'], run.parameters)})")
    if run.diverging == MOST_FAR:
        raise _diverged(run)


def _note_noise(run: Run, headers: Headers, global_batch: int) -> None:
    if run.config.is_exact:  # a gradient for each shard, else for each rank
        squares, samples = headers["squares"][run.shards.places], np.array(run.shards.sizes(global_batch))
    else:
        squares, samples = headers["squares"][:, 0], headers["samples"]
    noise, signal = estimate(squares, samples, run.replica.square)
    found = moments(noise, signal)
    if all(map(math.isfinite, found)):
        run.noise_sums = [total + one for total, one in zip(run.noise_sums, found, strict=True)]


def _loss_of_the_start(run: Run) -> float:
    """Of the first step, or of a blind guess, should the first samples have been easy ones."""
    return max(run.first_loss, run.task.blind_loss(run.data))


def _diverged(run: Run, what: str = "") -> DivergedError:
    what = what or f"a loss that is not finite, or more than {FAR} times the {_loss_of_the_start(run):.3g} of the start"
    bad = run.skipped or run.diverging
    advice = f"use a smaller --lr than {run.config.lr:g}"
    if run.skipped == run.step:
        advice = "no step was made yet, so it is not the learning rate: look for too large or too small numbers in the "
        advice += "images, or in what the model and the task make of them"
    return DivergedError(
        f"step {run.step}: {plural(bad, 'step')} in a row had {what}: {advice}",
        bad_from=run.good_until + 1,
    ).on_all_ranks()


def _who_is_bad(bad_at: NDArray[np.int64], parameters: Parameters) -> str:
    """Names the ranks whose gradient is not finite, and the first such tensor of each."""
    bad = [f"{parameters.name_at(int(index))} on rank {rank}" for rank, index in enumerate(bad_at) if index >= 0]
    return ", ".join(bad) or "in the sum of finite ones"


def _end_of_epoch(run: Run, epoch: int, images_per_second: float) -> EpochRecord:
    """Measure the scores, check that all replicas hold the same bits, and begin the sums of the next epoch."""
    scores = {part: _score(run, part) for part in PARTS if run.data.size(part)}
    if run.config.ema:
        scores |= {f"{EMA}_{part}": _score(run, part, True) for part in PARTS[1:] if run.data.size(part)}
    best = scores.get(f"{EMA}_validation", scores.get("validation", -math.inf))
    if best > run.best_score:
        run.best_score, run.best_epoch = best, epoch + 1
    train_loss = run.loss_sum / run.samples if run.samples else float("nan")
    noise_scale, noise_scale_error = scale_of(run.noise_sums)
    run.loss_sum, run.samples, run.noise_sums = 0.0, 0, [0.0] * MOMENTS
    _probe_the_wire(run, epoch)
    agreement.agree(run)  # at last, as what follows is saved
    health = run.probe.health
    return EpochRecord(
        step=run.step,
        epoch=epoch + 1,
        train_loss=train_loss,
        metric=run.task.metric,
        scores=scores,
        images_per_second=images_per_second,
        largest_gradient=health.largest_gradient,
        flushed_share=health.flushed_share,
        wire_error=health.wire_error,
        noise_scale=noise_scale,
        noise_scale_error=noise_scale_error,
        busy_seconds=run.take_busy(),
        parameters_sha256=run.parameters.digest(),
    )


def _score(run: Run, part: str, averaged: bool = False) -> float:
    score, weight = run.measure(part, run.config.eval_samples, averaged)
    return score / weight if weight else float("nan")


def _probe_the_wire(run: Run, epoch: int) -> None:
    """Look at what the wire makes of a gradient: that of the epoch's first batch at the weights of its end."""
    order = epoch_order(run.config.seed, epoch, run.data.size("train"))
    mine = run.shards.samples(order, 0, run.config.step_size)
    share = run.probe.sample(run.replica.share(run.step, mine, len(order[: run.config.step_size])))
    run.probe.compare(share, run.replica.sum_shares())
