"""`mpirun -n P python -m distconv.reproduce RUN`: train a run again, and say whether it has the same bits.

Nothing is written. What the run's metrics.jsonl says of each step and epoch is held against what happens now: every
loss, and the SHA-256 of the parameters.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distconv.comm.start import run_command, start
from distconv.command_line import Parser
from distconv.config import RESUME, Config
from distconv.errors import MismatchError, MissingInputError
from distconv.formatting import plural
from distconv.settings import read_toml

if TYPE_CHECKING:
    from distconv.comm.world import World
    from distconv.run.log import RunLog

Metrics = Sequence[Mapping[str, Any]]


def main(argv: Sequence[str]) -> int:
    flags = parse(argv)
    with start() as world:
        from distconv.run.log import RunLog

        log = RunLog(world.rank == 0)
        settings, metrics = world.on_rank_0(lambda: read_run(flags.run))
        world.watch.set_limits(settings.hang_seconds)
        steps, difference = train_again(settings, metrics, world, log, quiet=flags.json)
        starts = sum(record.get("event") == "start" for record in metrics)
        if difference and starts > 1:
            log.say_aside(f"the run was started {starts} times, and config.toml has the settings of the last time only")
        if difference and settings.resume not in RESUME:
            log.say_aside(f"the run went on from {settings.resume}, which may have been made with other settings")
        if flags.json:
            log.say(json.dumps({"ranks": world.size, "steps": steps, "same": not difference, "differs_at": difference}))
        elif difference:
            log.say(f"other bits: {difference}")
        else:
            log.say(f"the same bits: {steps:,} steps on {plural(world.size, 'rank')}")
        return int(bool(difference))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m distconv.reproduce",
        description="Train a run again by its config.toml, write nothing, and say whether each step has the same loss "
        "and each epoch the same parameters, to the bit. Of a run with --shards, any number of ranks up to that will "
        "do; else as many as it had. Exit code 1 where they differ.",
        epilog="examples:\n"
        "  mpirun -n 4 python -m distconv.train --shards 8 --out runs/mine\n"
        "  mpirun -n 3 python -m distconv.reproduce runs/mine\n\n"
        "--json prints ranks, steps (that were compared), same, differs_at.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, finished or not")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser.parse_args(argv)


def read_run(folder: Path) -> tuple[Config, Metrics]:
    """The settings of a run, and what it has written in metrics.jsonl. Raises MissingInputError, and as read_toml."""
    from distconv.run.array_files import meant
    from distconv.run.folder import members
    from distconv.run.log import read_metrics

    metrics = read_metrics(folder / "metrics.jsonl")
    if not of_each(metrics, "step", "train_loss"):
        of_it = members(folder)
        which = meant(folder) if of_it == [folder] else f", and this is an ensemble's: give {of_it[0]}, say"
        raise MissingInputError(f"{folder} has no metrics.jsonl with steps: a run's folder was expected{which}")
    if not (folder / "config.toml").is_file():
        raise MissingInputError(f"{folder} has no config.toml: a run's folder was expected")
    return Config(**read_toml(folder / "config.toml")), metrics


def train_again(settings: Config, metrics: Metrics, world: World, log: RunLog, quiet: bool) -> tuple[int, str]:
    """How many steps were the same, and the first thing that differs from these metrics, or nothing; collective.

    quiet: no word of how far it is. Raises MismatchError where the data or the number of ranks cannot give the bits.
    """
    from distconv.kernels.compiled import CACHE
    from distconv.run.build import build_run
    from distconv.run.initial_weights import load_initial_weights
    from distconv.run.loading import load_dataset, named_by_a_run
    from distconv.run.loop import EpochRecord, StepRecord, train
    from distconv.run.training import check_settings

    with world.together():
        check_settings(settings, world)
    CACHE.say = log.say_aside
    with named_by_a_run(settings.data):
        dataset, name = load_dataset(settings.data, world, log.say_aside, settings.limit_train, settings.validation)
    started = next((record for record in metrics if record.get("event") == "start"), {})
    if (sha256 := str(started.get("data_sha256", dataset.digest))) != dataset.digest:
        raise MismatchError(
            f"the run had a data set of SHA-256 {sha256[:12]}..., but {name} now has {dataset.digest[:12]}...: bring "
            "the old one back"
        ).on_all_ranks()
    if not settings.is_exact and (ranks := started.get("ranks", world.size)) != world.size:
        raise MismatchError(
            f"the run had no --shards, so its bits need as many ranks as it had, {ranks} and not {world.size}"
        ).on_all_ranks()

    losses, same, difference = of_each(metrics, "step", "train_loss"), 0, ""
    parameters, last = of_each(metrics, "epoch", "parameters_sha256"), max(losses)
    run = build_run(settings, dataset, world, log.say_aside)
    with named_by_a_run(settings.init):
        load_initial_weights(run, log.say_aside)
    for record in train(run, lambda: False):
        if isinstance(record, StepRecord):
            if not quiet:
                speed = record.images_per_second
                log.progress(record.step, last, record.epoch, settings.epochs, record.train_loss, speed)
            now, was = record.train_loss, losses.get(record.step)
            if was not in (None, now):
                difference = f"step {record.step} has the loss {now!r}, and had {was!r}"
            same += was == now
        elif isinstance(record, EpochRecord):
            sha256, before = record.parameters_sha256, parameters.get(record.step)
            if before not in (None, sha256):
                difference = f"epoch {record.epoch} ends with the parameters {sha256:.12}..., and had {before:.12}..."
        ends_here = record.step == last and not (record.step in parameters and isinstance(record, StepRecord))
        if difference or ends_here:
            break
    log.close()
    if not difference and run.step < last:
        difference = f"training ends after step {run.step}, and came to step {last}"
    return same, difference


def of_each(metrics: Metrics, event: str, key: str) -> dict[int, Any]:
    """A field of the records of that event, by their step; those without are left out."""
    found = (record for record in metrics if record.get("event") == event and record.get("step", 0) > 0)
    return {record["step"]: record[key] for record in found if isinstance(record.get(key), float | str)}


if __name__ == "__main__":
    run_command(main)
