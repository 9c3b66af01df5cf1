"""Several runs on one page: their curves over each other, and in a table what they do not have in common."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from distconv.run.report.charts import in_epochs, smoothed
from distconv.run.report.history import NOT_OF_THE_MODEL, History
from distconv.run.report.numbers import duration, milliseconds, percent, short
from distconv.run.report.svg import Line, Part, bar_chart, line_chart, run_color
from distconv.run.report.tables import table

STARTED = ("ranks", "hosts", "device", "precision", "exchange", "parameter_count", "data_sha256")  # not settings


def comparison(histories: Sequence[History]) -> str:
    """The page's body."""
    names = short_names(histories)
    lines: dict[str, list[Line]] = {key: [] for key in ("loss", "score", "rate", "speed")}
    bars = []
    for number, (name, history) in enumerate(zip(names, histories, strict=True)):
        color, dash = run_color(number)
        x, epochs = in_epochs(history), history.per_epoch("epoch")
        window = max(1, len(x) // 50)
        score = history.per_epoch(f"test_{history.metric}")
        lines["loss"].append(Line(name, x, smoothed(history.steps("train_loss"), window), color, dash))
        lines["score"].append(Line(name, epochs, score, color, dash, dots=True))
        lines["rate"].append(Line(name, x, history.steps("learning_rate"), color, dash))
        lines["speed"].append(Line(name, x, smoothed(history.steps("images_per_second"), window), color, dash))
        if len(x):
            parts = [
                Part(part, 1e3 * history.median(f"{part}_seconds"), f"--{part}")
                for part in ("compute", "exchange", "wait")
            ]
            bars.append((name, parts))
    most = 1.0 if all(history.metric == "accuracy" for history in histories) else math.inf
    figures = [
        line_chart("Training loss, smoothed", lines["loss"], "epoch", short, from_zero=True),
        line_chart("Test score of each epoch", lines["score"], "epoch", percent, most=most),
        line_chart("Images per second, smoothed", lines["speed"], "epoch", short, from_zero=True),
        line_chart("Learning rate", lines["rate"], "epoch", short, from_zero=True),
        bar_chart("A step of rank 0, medians", bars, milliseconds),
    ]
    return (
        f'<h2>Results</h2><div class="card scroll">{results(names, histories)}</div>'
        f'<h2>What differs</h2><div class="card scroll">{differences(names, histories)}</div>'
        f'<h2>Curves</h2><div class="grid2">{"".join(figures)}</div>'
    )


def short_names(histories: Sequence[History]) -> list[str]:
    """The last parts of the folders, as many as tell them apart."""
    paths = [history.folder.absolute().parts for history in histories]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def results(names: Sequence[str], histories: Sequence[History]) -> str:
    """What came out."""
    rows = []
    for name, history in zip(names, histories, strict=True):
        score, speed = percent(history.score), f"{history.median('images_per_second'):,.0f}"
        rows.append([name, score, f"{history.last_step:,}", speed, duration(history.elapsed), history.status])
    return table(["run", "test score", "steps", "images/s", "time", "status"], rows)


def differences(names: Sequence[str], histories: Sequence[History]) -> str:
    """A row for each setting, or fact of the start, that the runs do not share; a column for each run."""
    keys = list(dict.fromkeys(key for history in histories for key in history.settings if key not in NOT_OF_THE_MODEL))
    rows = []
    for key in [*keys, *STARTED]:
        of_start = key in STARTED and not any(key in history.settings for history in histories)
        values = [_shown((history.start if of_start else history.settings).get(key)) for history in histories]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return (
        table(["", *names], rows) if rows else f"<p>{html.escape('No setting: the runs were asked for the same.')}</p>"
    )


def _shown(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
