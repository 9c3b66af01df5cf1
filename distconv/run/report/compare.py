"""Several runs on one page: their curves over each other, and in a table what they do not have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distconv.formatting import duration, format_of_scores, milliseconds, percent, short
from distconv.pictures.curves import smoothed
from distconv.run.report.charts import in_epochs, reach, x_limits
from distconv.run.report.history import NOT_OF_THE_MODEL, History
from distconv.run.report.svg import Format, Line, Part, bar_chart, line_chart, run_color
from distconv.run.report.tables import table

STARTED = ("ranks", "hosts", "device", "precision", "exchange", "parameter_count", "data_sha256")  # not settings
LONGEST = 40  # characters of a value that a table has room for
FAR = 4  # times the median of the runs


def comparison(histories: Sequence[History]) -> str:
    """The page's body."""
    names = short_names(histories)
    lines: dict[str, list[Line]] = {key: [] for key in ("loss", "score", "rate", "speed")}
    bars = []
    for number, (name, history) in enumerate(zip(names, histories, strict=True)):
        color, dash = run_color(number)
        x, epochs = in_epochs(history), history.per_epoch("epoch")
        score = history.per_epoch(f"{history.judged}_{history.metric}")
        lines["loss"].append(Line(name, x, smoothed(history.steps("train_loss"), reach(x)), color, dash))
        lines["score"].append(Line(name, epochs, score, color, dash, dots=True))
        lines["rate"].append(Line(name, x, history.steps("learning_rate"), color, dash))
        lines["speed"].append(Line(name, x, smoothed(history.steps("images_per_second"), reach(x)), color, dash))
        if len(x):
            parts = [
                Part(part, 1e3 * history.median(f"{part}_seconds"), f"--{part}")
                for part in ("compute", "exchange", "wait")
            ]
            bars.append((name, parts))
    limits = 0.0, max(x_limits(history)[1] for history in histories)

    def chart(title: str, key: str, format_y: Format, from_zero: bool = True) -> str:
        most, largest = _most(lines[key]), max((_largest(line) for line in lines[key]), default=0.0)
        note = "Lines that leave the chart go on above it." if largest > most else ""
        return line_chart(title, lines[key], limits, format_y, from_zero, most=most, note=note)

    figures = [
        chart("Training loss, smoothed", "loss", short),
        chart("Test score of each epoch", "score", format_of_scores(line.y for line in lines["score"]), False),
        chart("Images per second, smoothed", "speed", short),
        chart("Learning rate", "rate", short),
        bar_chart("A step of rank 0, medians", bars, milliseconds),
    ]
    return (
        f'<h2>Results</h2><div class="card scroll">{results(names, histories)}</div>'
        f'<h2>What differs</h2><div class="card scroll">{differences(names, histories)}</div>'
        f'<h2>Curves</h2><div class="grid2">{"".join(figures)}</div>'
    )


def _most(lines: Sequence[Line]) -> float:
    """Where the y axis must end, so that one run that went astray does not press the others flat; else infinity."""
    largest = [number for line in lines if (number := _largest(line)) > -math.inf]
    most = FAR * float(np.median(largest)) if largest else math.inf
    if 0 < most < max(largest, default=0.0):
        return most
    return 1.0 if 0 <= max(largest, default=2.0) <= 1 else math.inf


def _largest(line: Line) -> float:
    """Of what is finite; minus infinity where nothing is."""
    values = np.asarray(line.y, np.float64)
    return float(np.max(values[np.isfinite(values)], initial=-math.inf))


def short_names(histories: Sequence[History]) -> list[str]:
    """The last parts of the folders, as many as tell them apart."""
    paths = [history.folder.absolute().parts for history in histories]
    for count in range(1, max(map(len, paths)) + 1):
        names = [str(Path(*path[-count:])) for path in paths]
        if len(set(names)) == len(set(paths)):  # somebody may name the same run twice
            break
    return names


def results(names: Sequence[str], histories: Sequence[History]) -> str:
    """What came out."""
    rows = []
    for name, history in zip(names, histories, strict=True):
        score, speed = history.score, history.median("images_per_second")
        shown = "-" if math.isnan(score) else f"{percent(score)} {history.metric}"
        images = "-" if math.isnan(speed) else f"{speed:,.0f}"
        counts = f"{history.ranks:,}", f"{history.last_step:,}"
        rows.append([name, shown, *counts, images, duration(history.seconds), history.status])
    return table(["run", "test score", "ranks", "steps", "images/s", "time", "status"], rows)


def differences(names: Sequence[str], histories: Sequence[History]) -> str:
    """A column for each setting, or fact of the start, that the runs do not share; a row for each run."""
    keys = list(dict.fromkeys(key for history in histories for key in history.settings if key not in NOT_OF_THE_MODEL))
    columns = []
    for key in [*keys, *STARTED]:
        of_start = key in STARTED and not any(key in history.settings for history in histories)
        values = [_shown((history.start if of_start else history.settings).get(key)) for history in histories]
        if len(set(values)) > 1:
            columns.append([key, *_cut(values)])
    if not columns:
        return "<p>Nothing: the runs were asked for the same, and started alike.</p>"
    head, *rows = zip(*columns, strict=True)
    return table(["run", *head], [[name, *row] for name, row in zip(names, rows, strict=True)])


def _shown(value: object) -> str:
    return "" if value is None else str(value)


def _cut(texts: Sequence[str]) -> list[str]:
    """The same, those that are long without their ends, if they differ in the rest."""
    short = [text if len(text) <= LONGEST else f"{text[:12]}…" for text in texts]
    return short if len(set(short)) == len(set(texts)) else list(texts)
