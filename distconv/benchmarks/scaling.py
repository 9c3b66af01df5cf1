"""Training on more and more ranks of this machine: images a second, and where the time of a step goes.

A job of its own for each number of ranks runs the loop of distconv.train on real data, without files and evaluation.
The jobs of the ladder run one after the other, and then all once more, so that a disturbance of the machine does not
meet one number of ranks only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from distconv.comm.world import World
from distconv.config import Config
from distconv.data.dataset import Dataset
from distconv.errors import DistconvError, UsageError
from distconv.formatting import plural
from distconv.process.time_slices import own_cores
from distconv.run.build import build_run
from distconv.run.loading import load_dataset
from distconv.run.loop import StepRecord, train
from distconv.run.noise import steps_needed
from distconv.supervise.launcher import rows, run_job

WARM_UP = 5  # steps of each job that do not count
ROUNDS = 2  # jobs for each number of ranks
SECONDS = 600.0  # that a job may take


@dataclass(frozen=True)
class Step:
    """One step as rank 0 saw it, in seconds; the rest of it is the optimizer's."""

    hosts: int
    step_seconds: float
    compute_seconds: float
    exchange_seconds: float
    wait_seconds: float
    slowest_rank: int


@dataclass(frozen=True)
class Rung:
    """One number of ranks: medians over its steps. batch_size: of all ranks together.

    speedup: over the fewest ranks of the ladder, times their number; efficiency: speedup / ranks. slowest_rank: the
    one that the others waited for most often. oversubscribed: there were more ranks than cores.
    """

    ranks: int
    hosts: int
    batch_size: int
    wire: str
    images_per_second: float
    speedup: float
    efficiency: float
    step_seconds: float
    compute_seconds: float
    exchange_seconds: float
    wait_seconds: float
    slowest_rank: int
    oversubscribed: bool


@dataclass(frozen=True)
class RungToGoal(Rung):
    """The same, and how long the training takes to the wanted accuracy."""

    steps: int
    training_seconds: float


def work(settings: Config, steps: int, world: World) -> list[Step]:
    """What one job measures: so many training steps on these ranks; collective."""
    dataset, _ = load_dataset(settings.data, world, lambda line: None)
    count = (WARM_UP + steps + 1) * settings.batch_size  # one more, so that no step ends an epoch
    if not isinstance(dataset, Dataset):
        raise UsageError(f"--data {settings.data} draws its own samples: name a data set, mnist say")
    again = np.arange(count) % len(dataset.train_labels)
    dataset = replace(dataset, train_images=dataset.train_images[again], train_labels=dataset.train_labels[again])
    run = build_run(settings, dataset, world)
    records = list(itertools.islice(train(run, lambda: False), WARM_UP + steps))
    return [
        Step(
            world.hosts,
            settings.batch_size / record.images_per_second,
            record.compute_seconds,
            record.exchange_seconds,
            record.wait_seconds,
            record.slowest_rank,
        )
        for record in records[WARM_UP:]
        if isinstance(record, StepRecord)
    ]


def climb(
    starter: Sequence[str],
    numbers: Sequence[int],
    batch_size: Callable[[int], int],
    wire: str,
    arguments: Sequence[str],
    note: Callable[[str], None],
) -> list[Rung]:
    """Run `python arguments...`, which prints a Step a line, on each number of ranks, fewest first, in turns.

    batch_size: of a number of ranks. A number whose job fails is noted and left out. Raises DistconvError where all do.
    """
    numbers = sorted(set(numbers))
    steps: dict[int, list[Step]] = {P: [] for P in numbers}
    for done in range(ROUNDS):
        for P in numbers:
            if done > 0 and not steps[P]:
                continue  # it has failed
            note(f"round {done + 1} of {ROUNDS}, {plural(P, 'rank')}")
            try:
                steps[P] += [Step(**row) for row in rows(run_job(starter, P, arguments, SECONDS), starter)]
            except DistconvError as error:
                note(f"{plural(P, 'rank')} left out: {error}")
    numbers = [P for P in numbers if steps[P]]
    if not numbers:
        raise DistconvError("no job of the ladder came to its end: see above")
    fewest = numbers[0]
    base = batch_size(fewest) / _median(steps[fewest], "step_seconds") / fewest
    return [_rung(P, batch_size(P), wire, steps[P], base) for P in numbers]


def with_goal(rung: Rung, noise_scale: float, steps: float, batch_size: int) -> RungToGoal:
    """steps: that batches of batch_size take to the wanted accuracy. noise_scale: in images."""
    needed = steps_needed(steps, noise_scale, rung.batch_size, batch_size)
    return RungToGoal(**vars(rung), steps=needed, training_seconds=needed * rung.step_seconds)


def table(rungs: Sequence[Rung]) -> str:
    """For people: a line for each number of ranks, its parts of a step in ms; with a goal, steps and time too."""
    has_goal, cores = any(isinstance(rung, RungToGoal) for rung in rungs), len(own_cores())
    lines = [
        f"{'ranks':>6}{'batch':>7}{'images/s':>11}{'speed-up':>10}{'efficiency':>12}"
        f"{'step':>9}{'compute':>9}{'wire':>9}{'wait ms':>9}{'slowest rank':>14}"
        + (f"{'steps':>12}{'time':>12}" if has_goal else "")
    ]
    for rung in rungs:
        parts = (rung.step_seconds, rung.compute_seconds, rung.exchange_seconds, rung.wait_seconds)
        lines.append(
            f"{rung.ranks:>6}{rung.batch_size:>7}{rung.images_per_second:>11,.0f}{rung.speedup:>10.2f}"
            f"{rung.efficiency:>12.0%}"
            + "".join(f"{1e3 * part:>9.2f}" for part in parts)
            + f"{rung.slowest_rank:>14}"
            + (f"{rung.steps:>12,}{rung.training_seconds:>10,.4g} s" if isinstance(rung, RungToGoal) else "")
            + (f"   more ranks than cores ({rung.hosts * cores}): oversubscribed" if rung.oversubscribed else "")
        )
    return "\n".join(lines)


def _rung(ranks: int, batch_size: int, wire: str, steps: Sequence[Step], base: float) -> Rung:
    """base: images a second and rank of the fewest ranks."""
    images_per_second = batch_size / _median(steps, "step_seconds")
    hosts = steps[0].hosts
    slowest = [step.slowest_rank for step in steps]
    return Rung(
        ranks,
        hosts,
        batch_size,
        wire,
        images_per_second,
        speedup=images_per_second / base,
        efficiency=images_per_second / base / ranks,
        step_seconds=_median(steps, "step_seconds"),
        compute_seconds=_median(steps, "compute_seconds"),
        exchange_seconds=_median(steps, "exchange_seconds"),
        wait_seconds=_median(steps, "wait_seconds"),
        slowest_rank=max(sorted(set(slowest)), key=slowest.count),
        oversubscribed=ranks > hosts * len(own_cores()),
    )


def _median(steps: Sequence[Step], field: str) -> float:
    return float(np.median([asdict(step)[field] for step in steps]))
