"""Decay, smoothed labels, the average of the weights and changed images, in whole steps of all ranks."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distconv.comm.world import World
from distconv.data.shard import epoch_order
from distconv.nn.layers import Context
from distconv.nn.schedules import Schedule
from distconv.run import loop
from distconv.run.build import build_run
from distconv.run.run import Run
from tests import reference
from tests.emulator import Emulator, available
from tests.parallel import test_training
from tests.parallel.test_gpu_steps import CPU_SETTINGS, SETTINGS, dataset, never

EVERYTHING = {
    "schedule": "one-cycle",
    "warmup_epochs": 0.6,
    "weight_decay": 2.0,
    "label_smoothing": 0.1,
    "ema": 0.6,
    "augment": "mnist,flip,crop=1,brightness=0.2,erase=0.3",
}
RATES = [Schedule(0.01, "one-cycle", 10, 3)(t) for t in range(1, 11)]  # of two epochs of five steps
exact = dataclasses.replace(CPU_SETTINGS, wire="float64", **EVERYTHING)  # type: ignore[arg-type]


def shares(step: int) -> float:
    """What the average with a decay of 0.6 takes of the weights after a step, counted from 0."""
    return max(0.4, 1 - (1 + step) / (10 + step))


def followed(run: Run) -> Iterator[tuple[loop.StepRecord, np.ndarray]]:
    """Each step's record and the gradient of its whole batch, which every rank has computed by itself."""
    records, batch_size = loop.train(run, never), run.config.batch_size
    while run.step < run.steps:
        epoch, batch = divmod(run.step, run.steps_per_epoch)
        order = epoch_order(run.config.seed, epoch, run.data.size("train"))
        samples = order[batch * batch_size : (batch + 1) * batch_size]
        gradient = run.replica.share(run.step, samples, len(samples)).copy()
        record = next(records)
        if isinstance(record, loop.EpochRecord):  # between two epochs; no step was made
            record = next(records)
        assert isinstance(record, loop.StepRecord)
        yield record, gradient


def test_steps_are_adamw_at_the_rates_of_the_schedule_and_the_average_follows(world: World) -> None:
    run = build_run(exact, dataset(), world)
    first = run.parameters.vector.copy()
    averages, gradients = first.copy(), []
    for step, (record, gradient) in enumerate(followed(run)):
        assert record.learning_rate == RATES[step]
        gradients.append(gradient)
        averages = (1 - shares(step)) * averages + shares(step) * run.parameters.vector
        np.testing.assert_allclose(run.replica.state["ema"], averages, rtol=1e-12, atol=1e-15)
    assert len(gradients) == 10

    names = run.parameters.named(np.arange(first.size))
    decaying = {int(i) for name, places in names.items() if name.endswith(".W") for i in places.ravel()}
    assert 0 < len(decaying) < first.size  # there are biases besides
    wanted = [
        [*reference.adamw(p, map(float, of), RATES, 2.0 * (i in decaying))][-1]
        for i, (p, of) in enumerate(zip(map(float, first), np.array(gradients).T, strict=True))
    ]
    np.testing.assert_allclose(run.parameters.vector, wanted, rtol=1e-9, atol=1e-12)


def test_a_step_that_is_skipped_leaves_the_average_alone(world: World) -> None:
    run = test_training.make_run(world, dataclasses.replace(test_training.SETTINGS, ema=0.9, weight_decay=0.1))
    test_training.with_a_bad_rank(run, {1, 3})
    averages = [run.replica.state["ema"].tobytes()]
    for record in loop.train(run, never):
        if isinstance(record, loop.StepRecord):
            averages.append(run.replica.state["ema"].tobytes())
            assert (averages[-1] == averages[-2]) == record.skipped == (record.step in (2, 4))
    assert len(averages) == 6


def black(x: Any, context: Context) -> Any:
    assert context.training
    return x * 0


def test_scores_are_those_of_images_as_they_are(world: World) -> None:
    """Those of the training images, too; the average's are of its own weights."""
    settings = dataclasses.replace(CPU_SETTINGS, augment=f"{__name__}:black", ema=0.5, epochs=1)
    few = dataset()
    plain = dataclasses.replace(few, test_images=few.train_images[3:], test_labels=few.train_labels[3:])
    run = build_run(settings, plain, world)
    rng = np.random.default_rng(1)
    for record in loop.train(run, never):
        if record.step == run.steps - 1:  # scores that differ between any two of these
            for vector in (run.parameters.vector, run.replica.state["ema"]):
                vector += rng.standard_normal(vector.size).astype(vector.dtype)
            run.checksum = run.replica.checksum()
    assert isinstance(record, loop.EpochRecord)
    assert set(record.scores) == {"train", "test", "ema_test"}

    def score(part: str, vector: np.ndarray, data: Any = plain) -> float:
        other = dataclasses.replace(run, data=data, replica=copy.copy(run.replica))
        other.replica.values = run.parameters.nested(vector)
        return np.divide(*other.measure(part))

    assert record.scores["train"] == score("train", run.parameters.vector)
    assert record.scores["test"] == score("test", run.parameters.vector)
    assert record.scores["ema_test"] == score("test", run.replica.state["ema"])
    dark = dataclasses.replace(plain, train_images=plain.train_images * 0)
    assert record.scores["train"] != score("train", run.parameters.vector, dark)
    assert record.scores["ema_test"] != record.scores["test"]


@pytest.mark.skipif(not available(), reason="no g++ to build the kernels for the CPU")
def test_everything_at_once_on_gpus_is_as_on_cpus_and_goes_on_to_the_bit(world: World, folder: Path) -> None:
    def on_gpu() -> Run:
        settings = dataclasses.replace(SETTINGS, wire="float32", epochs=1, **EVERYTHING)  # type: ignore[arg-type]
        return build_run(settings, dataset(), world, device=Emulator(folder))

    cpu = build_run(dataclasses.replace(exact, epochs=1), dataset(), world)
    gpu, resumed = on_gpu(), on_gpu()
    first, middle = cpu.parameters.vector.copy(), {}
    for one, other in zip(loop.train(cpu, never), loop.train(gpu, never), strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-4)  # type: ignore[union-attr]
        if isinstance(other, loop.StepRecord) and other.step == 3:
            gpu.replica.pull()
            middle = pickle.loads(pickle.dumps((gpu.position(), gpu.vectors())))
        if isinstance(other, loop.EpochRecord):
            assert set(other.scores) == {"train", "test", "ema_test"}
    resumed.restore(*middle)
    list(loop.train(resumed, never))
    for run in (gpu, resumed):
        run.replica.pull()
    for slot, wanted in cpu.vectors().items():
        found = gpu.vectors()[slot]
        assert resumed.vectors()[slot].tobytes() == found.tobytes(), slot
        if slot in ("value", "ema"):
            assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted - first), slot
