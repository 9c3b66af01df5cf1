"""The curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from distconv.pictures.style import COLORS, save


def draw_curves(records: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Loss and scores of each epoch, from the records of metrics.jsonl, as a PNG."""
    epochs = [record for record in records if record.get("event") == "epoch"]
    number = [record.get("epoch") or 0 for record in epochs]
    metric = next((record["metric"] for record in records if record.get("metric")), "accuracy")
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, score = figure.subplots(1, 2)
    figure.suptitle(title)
    loss.plot(number, [record.get("train_loss") for record in epochs], "o-", color=COLORS["train"])
    loss.set(title="loss in training", xlabel="epoch", ylabel="mean over the samples")
    loss.set_ylim(bottom=0)
    for part, label in (
        ("train", "training"), ("validation", "validation"), ("test", "test"), ("ema_test", "test, averaged weights"),
    ):  # fmt: skip
        scores = [record.get(f"{part}_{metric}") for record in epochs]
        if part in ("train", "test") or any(scores):
            score.plot(number, scores, "o-", color=COLORS[part], label=label)
    score.set(title=f"{metric} in evaluation", xlabel="epoch")
    score.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
    score.legend()
    for axes in (loss, score):
        if number:
            axes.set_xlim(number[0] - 0.5, number[-1] + 0.5)  # a single epoch would get fractions of epochs beside it
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    save(figure, path)
