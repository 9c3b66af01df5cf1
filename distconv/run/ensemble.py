"""Several runs at once, which differ in their seed alone: the ranks of a job divided into groups, a run for each.

Each run has a folder of its own, and is a run like any other: it goes on where it stopped, and `evaluate` takes them
all together. With fewer ranks than runs, each rank is a group, and trains its runs one after the other.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path

from distconv.comm.placement import place
from distconv.comm.world import World
from distconv.config import Config
from distconv.data.shard import split
from distconv.errors import STOPPED, CannotCreateError, DistconvError, UsageError
from distconv.run.folder import make_folder
from distconv.run.log import RunLog
from distconv.run.stopping import StopRequest
from distconv.run.training import agree_on_settings, same_command, train

FOR_EVER = 1e9  # seconds


def train_ensemble(settings: Config, world: World, stop: StopRequest) -> int:
    """Train the runs, this rank that of its group; returns the exit code, the largest of all."""
    agree_on_settings(settings, world)  # the number of runs too, before the ranks part
    groups = min(settings.ensemble, world.size)
    group = next(g for g in range(groups) if world.rank in range(world.size)[split(world.size, groups, g)])
    with world.together():
        if settings.resume not in ("auto", "never"):
            raise UsageError(f"--resume {settings.resume} with --ensemble: each run goes on from its own folder")
        if settings.trace and os.path.isdir(settings.trace):  # noqa: PTH112 (pathlib raises where a name is too long)
            raise CannotCreateError(f"--trace {settings.trace} is a folder: name a file")
    out = world.on_rank_0(lambda: make_folder(settings))
    placed = place(world, settings.device, settings.precision)
    world.watch.set_limits(FOR_EVER)  # each group watches itself
    code = 0
    try:
        with World(world.comm.Split(group, world.rank), world.library) as mine:
            mine.watch.set_limits(settings.hang_seconds)
            for member in range(group, settings.ensemble, groups):
                trace = Path(settings.trace)
                of_member = dataclasses.replace(
                    settings,
                    ensemble=1,
                    seed=(settings.seed + member) % 2**32,
                    out=str(out / f"member-{member}"),
                    trace=str(trace.with_stem(f"{trace.stem}-member-{member}")) if settings.trace else "",
                )
                log = RunLog(mine.rank == 0, f"member {member}: ")
                code = max(code, train(of_member, mine, stop, log, placed))
                if code == STOPPED:
                    break
    except DistconvError as error:
        error.everywhere = False  # the other groups do not know of it
        raise
    code = int(max(world.gathered(code)))
    together = f"together: python -m distconv.evaluate {shlex.quote(str(out))}"
    stopped = f"stopped on request; {same_command(settings, out)} goes on with all members"
    RunLog(world.rank == 0).say(together if code < STOPPED else stopped)
    return code
