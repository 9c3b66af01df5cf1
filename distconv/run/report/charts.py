"""The charts of one run."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from distconv.formatting import format_of_scores, milliseconds, percent, short
from distconv.pictures.curves import smoothed
from distconv.run.report.history import History
from distconv.run.report.svg import Line, Numbers, Part, area_chart, bar_chart, heat_map, line_chart

SCORES = (  # of an epoch, with the colour of the page and the dashes that tell them apart
    ("train", "training", "--train", "6 3"),
    ("validation", "validation", "--validation", "2 3"),
    ("test", "test", "--test", ""),
    ("ema_test", "test, averaged weights", "--averaged", "8 3 2 3"),
    ("ema_validation", "validation, averaged weights", "--rest", "8 3 2 3"),
)
MOST_RANKS = 24  # that are shown one by one


def charts(history: History) -> list[tuple[str, list[str]]]:
    """Sections of figures, each with its heading; figures that have nothing to show are left out."""
    sections = [
        ("Learning", [loss_chart(history), score_chart(history), rate_chart(history)]),
        ("Time", [speed_chart(history), time_chart(history), rank_bars(history), rank_map(history)]),
        ("Gradients", [noise_chart(history), wire_chart(history)]),
    ]
    return [(name, [figure for figure in figures if figure]) for name, figures in sections]


def in_epochs(history: History) -> Numbers:
    """(S,), where each step lies among the epochs: 2.5 is the middle of the third."""
    return history.steps("step") / history.steps_per_epoch


def x_limits(history: History) -> tuple[float, float]:
    """From the beginning to the last epoch, whole."""
    last = float(np.max(in_epochs(history), initial=0.0))
    return 0.0, math.ceil(last - 1e-9) if last >= 1 else last or 1.0


def loss_chart(history: History) -> str:
    note = "In training, where dropout, label smoothing and changed images make it larger than in evaluation."
    return line_chart(
        "Training loss", raw_and_smoothed(history, "train_loss"), x_limits(history), short, True, note=note
    )


def raw_and_smoothed(history: History, key: str) -> list[Line]:
    """The lines of a number that each step has."""
    x, y = in_epochs(history), history.steps(key)
    return [Line("", x, y, "--train", raw=True), Line("smoothed", x, smoothed(y, reach(y)), "--train")]


def reach(values: Numbers) -> float:
    """Of the smoothing: so that a curve of (S,) steps has some fifty places."""
    return max(1.0, len(values) / 100)


def score_chart(history: History) -> str:
    lines = [
        Line(name, history.per_epoch("epoch"), history.per_epoch(f"{part}_{history.metric}"), color, dash, dots=True)
        for part, name, color, dash in SCORES
    ]
    images = history.settings.get("eval_samples")
    note = "After each epoch" + (f", on {images:,} images of each part, or all there are." if images else ".")
    if history.final is not None and not math.isnan(history.score):
        note += f" At the end {percent(history.score)} on the whole test set."
    form = format_of_scores(line.y for line in lines)
    return line_chart(f"Scores: {history.metric}", lines, x_limits(history), form, most=_top(history), note=note)


def rate_chart(history: History) -> str:
    rate = history.steps("learning_rate")
    if not np.isfinite(rate).any() or np.nanmax(rate) == np.nanmin(rate):
        return ""
    line = Line("rate", in_epochs(history), rate, "--train")
    return line_chart("Learning rate", [line], x_limits(history), short, True)


def noise_chart(history: History) -> str:
    scales = history.per_epoch("noise_scale")
    if not np.isfinite(scales).any():
        return ""
    epochs, error = history.per_epoch("epoch"), scales * history.per_epoch("noise_scale_error")
    lines = [
        Line("noise scale", epochs, scales, "--train", dots=True),
        Line("plus its error", epochs, scales + error, "--train", "2 3"),
        Line("minus its error", epochs, scales - error, "--train", "2 3"),
        Line("batch size", [0, x_limits(history)[1]], [history.batch_size] * 2, "--rest", "6 3"),
    ]
    note = (
        "In images: in the gradient of a batch of so many, noise is half. Far above the batch size, larger batches pay."
    )
    return line_chart("Noise scale", lines, x_limits(history), short, log=True, note=note)


def speed_chart(history: History) -> str:
    return line_chart(
        "Images per second, all ranks", raw_and_smoothed(history, "images_per_second"), x_limits(history), short, True
    )


def wire_chart(history: History) -> str:
    if history.ranks == 1:
        return ""
    shown = (
        ("largest number", "largest_gradient", "--rest", "2 3"),
        ("relative error of the sum", "wire_error", "--train", ""),
        ("share that became 0", "flushed_share", "--test", "6 3"),
    )
    lines = [
        Line(name, history.per_epoch("epoch"), history.per_epoch(key), color, dash, dots=True)
        for name, key, color, dash in shown
    ]
    note = f"Of one gradient at the end of each epoch, by {history.start.get('wire')}, beside the same sum in float32."
    note += " A share of 0 has no place here."
    return line_chart("What the wire loses", lines, x_limits(history), "{:.0e}".format, log=True, note=note)


def time_chart(history: History) -> str:
    x = in_epochs(history)
    parts = [
        Line(part, x, 1e3 * history.steps(f"{part}_seconds"), f"--{part}") for part in ("compute", "exchange", "wait")
    ]
    return area_chart(
        "A step of rank 0, ms", x, parts, x_limits(history), short, "The numbers are medians over the run."
    )


def rank_bars(history: History) -> str:
    """How long each rank is busy in a step, and how often each was the slowest."""
    if len(history.rank_seconds) < 2:
        return ""
    busy, slowest = history.rank_seconds[:, -1], Counter(history.steps_of_now("slowest_rank").tolist())
    names, count = history.start.get("hostnames") or [], max(1, len(history.steps_of_now("step")))
    order, bars = _shown(busy), []
    for rank in order:
        host = f" {names[rank]}" if len(set(names)) > 1 and rank < len(names) else ""
        label = f"rank {rank}{host}, last in {slowest[rank] / count:.0%}"
        bars.append((label, [Part("busy", 1e3 * float(busy[rank]), "--compute")]))
    note = f"The {MOST_RANKS} slowest of {len(busy):,} ranks. " if len(order) < len(busy) else ""
    note += (
        "Mean time from one exchange to the next in the last epoch; and in which share of its steps the rank came last."
    )
    return bar_chart("Each rank's own time", bars, milliseconds, note)


def rank_map(history: History) -> str:
    """The same over the epochs, where there are some: which rank became slow, and when."""
    P, E = history.rank_seconds.shape
    if P < 2 or E < 2:
        return ""
    order = _shown(history.rank_seconds[:, -1])
    shown = 1e3 * history.rank_seconds[order]
    note = f"The darker, the longer: from {milliseconds(np.nanmin(shown))} to {milliseconds(np.nanmax(shown))}."
    epochs = [epoch["epoch"] for epoch in history.timed_epochs]
    return heat_map("Each rank's own time, epoch by epoch", [epochs[0] - 1, *epochs], [f"rank {r}" for r in order],
                    shown, milliseconds, note)  # fmt: skip


def _shown(busy: Numbers) -> list[int]:
    """The ranks that are shown: all, or of many the slowest."""
    return list(range(len(busy))) if len(busy) <= MOST_RANKS else np.argsort(-busy)[:MOST_RANKS].tolist()


def _top(history: History) -> float:
    """Where the axis of the scores ends: an accuracy is 1 at most, of a user's own metric nobody knows."""
    return 1.0 if history.metric == "accuracy" else math.inf
