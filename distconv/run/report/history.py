"""What a run's folder tells of it: settings, records, accidents, answers. Nothing else is read, so it may lie anywhere.

A folder that is incomplete, of an older version, or written to at this moment, tells what it has.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.config import EXACT, Config, flag
from distconv.errors import DistconvError, MissingInputError, StorageError
from distconv.pictures.curves import column
from distconv.run.array_files import meant
from distconv.run.folder import LOCK
from distconv.run.log import read_metrics, steps_alike
from distconv.run.report.samples import ANSWERS, Samples, load_samples
from distconv.settings import read_toml

Numbers = NDArray[np.float64]
Record = Mapping[str, Any]
ACCIDENT = "ended by an accident"
# Settings that say where a run lies, how it goes on, and what is told of it.
NOT_OF_THE_MODEL = ("out", "resume", "trace", "trace_steps", "tensorboard")


@dataclass(frozen=True)
class Attempt:
    """A part of a run, from one start until it ended in whatever way. seconds: until the last record that still counts.

    lost: seconds between the end of the part before and this start, if an accident ended that one. end: how it ended.
    """

    start: Record
    seconds: float
    lost: float
    last_step: int
    end: str


@dataclass(frozen=True)
class History:
    """A run, as its folder tells of it. status: finished, stopped, failed, running, or cut off."""

    folder: Path
    settings: Mapping[str, Any]
    records: Sequence[Record]
    status: str
    failures: Sequence[str]
    samples: Samples | None

    @cached_property
    def start(self) -> Record:
        """The record of the last start; empty where none is known."""
        return next((record for record in reversed(self.records) if record.get("event") == "start"), {})

    @cached_property
    def epochs(self) -> Sequence[Record]:
        return [record for record in self.records if record.get("event") == "epoch"]

    @cached_property
    def final(self) -> Record | None:
        return next((record for record in reversed(self.records) if record.get("event") == "final"), None)

    @cached_property
    def _steps(self) -> Sequence[Record]:
        return [record for record in self.records if record.get("event") == "step"]

    def steps(self, key: str) -> Numbers:
        """(S,), of each step; NaN where it was not finite, or is not known."""
        return column(self._steps, key)

    @cached_property
    def _steps_alike(self) -> Sequence[Record]:
        return steps_alike(self.records)

    def steps_of_now(self, key: str) -> Numbers:
        """(S,), likewise of the steps that were made as those of the last start, by as many ranks."""
        return column(self._steps_alike, key)

    def median(self, key: str) -> float:
        """Over these; NaN where it is not known of any."""
        values = self.steps_of_now(key)
        known = values[np.isfinite(values)]
        return float(np.median(known)) if len(known) else math.nan

    @property
    def step_seconds(self) -> float:
        """How long a step takes; NaN where that is not known."""
        speed = self.median("images_per_second")
        return self.batch_size / speed if speed > 0 else math.nan

    @property
    def last_step(self) -> int:
        return self.attempts[-1].last_step

    def per_epoch(self, key: str) -> Numbers:
        """(E,), of each epoch, likewise."""
        return column(self.epochs, key)

    @cached_property
    def timed_epochs(self) -> Sequence[Mapping[str, Any]]:
        """The epochs that know how long each rank was busy."""
        return [epoch for epoch in self.epochs if epoch.get("epoch") and _are_numbers(epoch.get("busy_seconds"))]

    @cached_property
    def rank_seconds(self) -> Numbers:
        """(P, E), mean seconds of a step that each rank was busy in each of these; NaN where an epoch had fewer ranks.

        Empty where it is not known of the ranks that the run has now.
        """
        columns = [np.array(epoch["busy_seconds"], np.float64) for epoch in self.timed_epochs]
        if not columns or len(columns[-1]) != self.ranks:
            return np.empty((0, 0))
        table = np.full((self.ranks, len(columns)), math.nan)
        for place, busy in zip(table.T, columns, strict=True):
            place[: len(busy)] = busy[: len(place)]
        return table

    @cached_property
    def metric(self) -> str:
        """What scores are called: accuracy, or a task's own word."""
        named = next((str(record["metric"]) for record in self.records if record.get("metric")), "")
        scores = [key for record in self.epochs for key in record if key.startswith("test_")]
        return named or (scores[0].removeprefix("test_") if scores else "accuracy")

    @cached_property
    def judged(self) -> str:
        """What begins the name of the scores that count: those of averaged weights where there are such."""
        key = f"ema_test_{self.metric}"
        return "ema_test" if any(record.get(key) is not None for record in self.records) else "test"

    @property
    def score(self) -> float:
        """Of the whole test set; else of the last epoch; or NaN."""
        key = f"{self.judged}_{self.metric}"
        found = [record[key] for record in (*self.epochs, self.final or {}) if record.get(key) is not None]
        return float(found[-1]) if found else math.nan

    @property
    def ranks(self) -> int:
        return int(self.start.get("ranks") or 1)

    @property
    def batch_size(self) -> int:
        """Images of a step; of a batch that is larger than the training set, all that there are."""
        asked, images = int(self.start.get("batch_size") or 0), int(self.start.get("train_images") or 0)
        return min(asked, images or asked)

    @property
    def steps_per_epoch(self) -> float:
        """So that a step's place among the epochs is known."""
        for record in self.epochs:
            if record.get("epoch") and record.get("step"):
                return float(record["step"] / record["epoch"])
        planned, epochs = self.start.get("steps"), self.settings.get("epochs")
        return planned / epochs if planned and epochs else float(max(1, len(self._steps)))

    @cached_property
    def attempts(self) -> Sequence[Attempt]:
        """The starts of the run, in order; of steps that were made again, only the last counts."""
        begins = [n for n, record in enumerate(self.records) if record.get("event") == "start"]
        found: list[Attempt] = []
        before = None  # when the attempt before ended, if nobody wanted it to
        for begin, end in zip(begins, [*begins[1:], len(self.records)], strict=True):
            start, kept = self.records[begin], self.records[begin + 1 : end]
            began = _time(start)
            ended = max([began, *(_time(record) for record in kept)])
            steps = [record.get("step") or 0 for record in kept if record.get("event") == "step"]
            last = max(steps, default=start.get("resumed_step") or 0)
            planned = start.get("steps") or math.inf
            stopped = bool(kept) and kept[-1].get("event") == "stop"
            if end == len(self.records):
                how = self.status
            elif stopped:
                how = "stopped"
            elif last >= planned and (self.records[end].get("steps") or 0) > planned:
                how = "finished"  # then somebody gave it more epochs
            else:
                how = ACCIDENT
            found.append(Attempt(start, ended - began, max(0.0, began - (before or began)), last, how))
            before = ended if how == ACCIDENT else None
        return found

    @property
    def seconds(self) -> float:
        """In which the run came forward."""
        return sum(attempt.seconds for attempt in self.attempts)

    @property
    def goodput(self) -> float:
        """The share of the time in which it came forward: the rest went to accidents, or to steps made again.

        Pauses after a stop on request, or after the end of a run that then got more epochs, are in neither.
        """
        lost = sum(attempt.lost for attempt in self.attempts)
        return self.seconds / (self.seconds + lost) if lost else 1.0

    @property
    def command(self) -> str:
        """What starts such a run: the settings that are not the defaults, as flags; empty where nobody knows them."""
        if not self.settings:
            return ""
        defaults = {field.name: field.default for field in dataclasses.fields(Config)}
        if self.settings.get("shards"):
            defaults["wire"] = EXACT[0]  # as settings.py has it
        flags = [
            flag(name) if value is True else f"{flag(name)} {_quoted(value)}"
            for name, value in self.settings.items()
            if name in defaults and value != defaults[name] and name not in NOT_OF_THE_MODEL
        ]
        return " ".join([f"mpirun -n {self.ranks} python -m distconv.train", *flags])


def read_history(folder: Path, failure: str = "") -> History:
    """Read a run's folder. failure: what has just ended the run, and is in no file of it yet.

    Raises MissingInputError where there is no run, StorageError where it cannot be read.
    """
    path = folder / "metrics.jsonl"
    try:
        if not folder.is_dir():
            what = "is no folder" if folder.exists() else "does not exist"
            raise MissingInputError(f"{folder} {what}: a run's folder, as --out names it, was expected{meant(folder)}")
        if not path.is_file():
            raise MissingInputError(
                f"{folder} holds no metrics.jsonl: the folder of a run, as --out names it, was expected{meant(folder)}"
            )
        records = read_metrics(path)
        if not any(record.get("event") == "start" for record in records):
            raise MissingInputError(f"{path} tells of no run: it has no start record")
        settings = _settings(folder / "config.toml")
        failures = [failure] * bool(failure)
        failures += [_failure(report) for report in sorted((folder / "errors").glob("rank-*.json"))]
        final = any(record.get("event") == "final" for record in records)
        samples = load_samples(folder / ANSWERS) if final else None
        return History(folder, settings, records, _status(folder, records, failures), failures, samples)
    except OSError as error:
        raise StorageError(f"{folder} cannot be read: {error.strerror or error}") from None


def _settings(path: Path) -> Mapping[str, Any]:
    """Of a config.toml, as far as this version knows them."""
    try:
        return read_toml(path)
    except DistconvError:
        return {}


def _status(folder: Path, records: Sequence[Record], failures: Sequence[str]) -> str:
    last = records[-1].get("event")
    if last == "final":
        return "finished"
    if last == "stop":
        return "stopped"
    if failures:
        return "failed"
    return "running" if _is_held(folder / LOCK) else "cut off"


def _is_held(lock: Path) -> bool:
    """Whether a job has the folder at this moment."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks on this file system
        return False
    return False


def _failure(path: Path) -> str:
    """The message of a rank that failed."""
    try:
        report = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        return f"rank {report['rank']}: {report['error']}"
    except (OSError, ValueError, LookupError, TypeError):
        return path.name


def _time(record: Record) -> float:
    return float(record.get("time") or 0)


def _quoted(value: Any) -> str:
    return shlex.quote(f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value))


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, int | float) for value in values)
