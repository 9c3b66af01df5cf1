"""The curves of a run: its loss, its learning rate where that changes, its scores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from distconv.pictures.style import BESIDE, COLORS, GRAY, by_powers, head

Numbers = NDArray[np.float64]
Records = Sequence[Mapping[str, Any]]
MOST_DRAWN = 2000  # points of a line; more cannot be told apart, and take seconds to draw
MOST_MARKED = 40  # epochs whose points have room for a marker
SMOOTHING = 1 / 100  # of the steps of a run: how far a step counts for its neighbours
SPAN_OF_A_LOG_AXIS = 20  # of the largest loss to the smallest: the end of a line would be flat on a plain axis
PARTS = {  # of the data: what people call it, its marker and its dashes, for eyes that see no colours
    "train": ("training", "o", "-"),
    "validation": ("validation", "s", "--"),
    "ema_validation": ("validation, averaged", "v", ":"),
    "test": ("test", "D", "-"),
    "ema_test": ("test, averaged", "^", "-."),
}


def draw_curves(records: Records, title: str, notes: Sequence[str] = ()) -> Figure:
    """What became of a run, from the records of its metrics.jsonl; an unfinished one has no final score.

    Against the epochs: the loss of the steps, the learning rate of a schedule, the scores after each epoch and that of
    the end. title: what was trained, to which the final score is added. notes: sentences below the picture.
    """
    steps, epochs = ([record for record in records if record.get("event") == event] for event in ("step", "epoch"))
    final = next((record for record in reversed(records) if record.get("event") == "final"), {})
    places, rates = epochs_done(records), column(steps, "learning_rate")
    scheduled = len(finite(rates)) > 0 and np.ptp(finite(rates)) > 1e-9 * finite(rates).max()
    figure = Figure(figsize=(12, 5.2 if scheduled else 4.4))
    grid = figure.subplot_mosaic(
        [["loss", "score"], ["rate", "score"]] if scheduled else [["loss", "score"]],
        height_ratios=[3, 1] if scheduled else [1],
    )
    draw_loss(grid["loss"], steps, epochs, places)
    if scheduled:
        grid["rate"].plot(*thinned(places, rates), color=GRAY)
        peak = finite(rates).max()
        grid["rate"].set(
            title="learning rate", ylim=(0, 1.1 * peak), yticks=[0, peak], yticklabels=["0", f"{peak:.3g}"]
        )
    metric = next((record["metric"] for record in reversed(records) if record.get("metric")), "accuracy")
    score = draw_scores(grid["score"], epochs, final, metric)
    end = max([1.0, *places[-1:], *column(epochs, "epoch")[-1:]])
    for name, axes in grid.items():
        axes.set_xlim(0, math.ceil(end) + 0.03 * end)
        axes.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        axes.grid()
        if not (scheduled and name == "loss"):
            axes.set_xlabel("epoch")
    head(figure, f"{title}: {score}" if score else title, notes)
    return figure


def draw_loss(axes: Axes, steps: Records, epochs: Records, places: Numbers) -> None:
    """Of each step, smoothed, and the mean of each epoch as a line as long as it."""
    losses = column(steps, "train_loss")
    smooth = smoothed(losses, max(0.1, SMOOTHING * len(losses)))
    means, ends = column(epochs, "train_loss"), column(epochs, "epoch")
    if len(losses):
        marker = "o" if len(losses) == 1 else ""  # a line of one point shows nothing
        axes.plot(*thinned(places, losses), color=COLORS["train"], alpha=0.3, linewidth=0.8, label="a step's batch")
        axes.plot(*thinned(places, smooth), color=COLORS["train"], marker=marker, label="smoothed")
    if len(means):
        axes.hlines(means, ends - 1, ends, color="black", linewidth=1.2, label="mean of an epoch")
    axes.set_title("loss in training")
    shown = finite(np.concatenate([losses, smooth, means]))
    least = finite(np.concatenate([smooth, means])).min(initial=math.inf)
    if len(shown) and 0 < least < shown.max() / SPAN_OF_A_LOG_AXIS:
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(shown.min(), least / 10) / 1.5)  # a batch may have lost nothing at all
        by_powers(axes.yaxis)
    elif len(shown) and shown.min() >= 0:
        axes.set_ylim(bottom=0)
    if len(shown):
        axes.legend()
    else:
        say_nothing(axes, "no loss is finite" if len(losses) else "no step is done yet")


def draw_scores(axes: Axes, epochs: Records, final: Mapping[str, Any], metric: str) -> str:
    """Of each part after each epoch, and the final one of the test set. Returns the final one in words, if there is."""
    number = column(epochs, "epoch")
    scores = {part: column(epochs, f"{part}_{metric}") for part in PARTS}
    ends = {part: final[f"{part}_{metric}"] for part in PARTS if final.get(f"{part}_{metric}") is not None}
    known = finite(np.concatenate([*scores.values(), [*ends.values()]]))
    percent = len(known) > 0 and known.min() >= 0 and known.max() <= 1  # another metric may be anything
    for part, (label, marker, dashes) in PARTS.items():
        if np.isfinite(scores[part]).any():
            marker = marker if len(epochs) <= MOST_MARKED else ""
            axes.plot(number, scores[part], marker=marker, linestyle=dashes, color=COLORS[part], label=label)
    words: list[str] = []
    for part, score in ends.items():
        text = f"{score:.2%}" if percent else f"{score:.4g}"
        label = f"{text}: {PARTS[part][0]}, in the end"
        axes.axhline(score, color=COLORS[part], linestyle=(0, (8, 3)), linewidth=1.2, label=label)
        words.append(text if words else f"test {metric} {text}")
    axes.set_title(f"{metric} in evaluation")
    if percent:
        low, high = axes.get_ylim()  # of scores that are all alike, too: no axis goes on to 104 %
        axes.set_ylim(max(low, -0.05 * high), min(high, 1 + 0.05 * (1 - low)))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if len(known):
        axes.legend(**BESIDE)
    else:
        say_nothing(axes, "no epoch is finished yet")
    return ", with averaged weights ".join(words)


def say_nothing(axes: Axes, why: str) -> None:
    """Where there is nothing to draw."""
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color="0.3")
    axes.set_yticks([])


def column(records: Records, key: str) -> Numbers:
    """A number of each record -> (N,); NaN where it was not finite, or is not there."""
    values = [record.get(key) for record in records]
    return np.array([value if isinstance(value, int | float) else math.nan for value in values], np.float64)


def finite(values: Numbers) -> Numbers:
    """Those that are."""
    found: Numbers = values[np.isfinite(values)]
    return found


def epochs_done(records: Records) -> Numbers:
    """How many epochs, in fractions, each step record ends at -> (steps,)."""
    steps = column([record for record in records if record.get("event") == "step"], "step")
    ends = [record for record in records if record.get("event") == "epoch" and record.get("epoch")]
    start = next((record for record in records if record.get("event") == "start"), {})
    if ends:
        per_epoch = ends[-1].get("step", 0) / ends[-1]["epoch"]
    else:  # stopped in the first one
        per_epoch = math.ceil(start.get("train_images", 0) / start.get("batch_size", 1))
    done: Numbers = steps / (per_epoch or max(1.0, steps.max(initial=0)))
    return done


def smoothed(values: Sequence[float] | Numbers, reach: float) -> Numbers:
    """The course of a noisy curve (N,) -> (N,): the mean around each place, weighted by exp(-distance / reach).

    reach: in places, above 0. As what follows counts as much as what came before, a steep part does not come late.
    Values that are not finite do not count; where none is near, the mean is NaN.
    """
    numbers = np.asarray(values, np.float64)
    known = np.isfinite(numbers)
    weights = known.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Numbers = _weighted_sums(np.where(known, numbers, 0.0), reach) / _weighted_sums(weights, reach)
    return means


def _weighted_sums(values: Numbers, reach: float) -> Numbers:
    """Of all values around each."""
    decay = math.exp(-1 / reach)
    before, behind = (
        np.array([*itertools.accumulate(side.tolist(), lambda total, value: decay * total + value)])
        for side in (values, values[::-1])
    )
    sums: Numbers = before + behind[::-1] - values
    return sums


def thinned(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """The same line of points (N,) with MOST_DRAWN or less: of each stretch of a longer one, the lowest and highest."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(y) <= MOST_DRAWN:
        return x, y
    bounds = np.linspace(0, len(y), MOST_DRAWN // 2 + 1).astype(int)
    kept = [
        start + place
        for start, stop in itertools.pairwise(bounds)
        for place in sorted((int(y[start:stop].argmin()), int(y[start:stop].argmax())))
    ]
    return x[kept], y[kept]
