"""Pictures: the curves of a run, the grid of mistakes. Drawn without a display, by whoever calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from distconv.data.dataset import Bytes


def draw_curves(records: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Loss and accuracies of each epoch, from the records of metrics.jsonl, as a PNG."""
    epochs = [record for record in records if record["event"] == "epoch"]
    number = [record["epoch"] for record in epochs]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    figure.suptitle(title)
    loss.plot(number, [record["train_loss"] for record in epochs], "o-", color="tab:blue")
    loss.set(title="training loss (with dropout)", xlabel="epoch", ylabel="mean cross-entropy")
    loss.set_ylim(bottom=0)
    for key, label, color in (("train_accuracy", "training", "tab:gray"), ("test_accuracy", "test", "tab:orange")):
        accuracy.plot(number, [record[key] for record in epochs], "o-", color=color, label=label)
    accuracy.set(title="accuracy (without dropout)", xlabel="epoch")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    accuracy.legend()
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_mistakes(images: Bytes, pairs: Sequence[tuple[int, int]], title: str, path: Path) -> None:
    """Images (N, H, W, C), at most 20, in a grid of 4 x 5, each with its (label, inference), as a PNG."""
    figure = Figure(figsize=(8, 7.2), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(4, 5).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, pair in zip(grid, images, pairs, strict=False):
        axes.imshow(image[..., 0] if image.shape[-1] == 1 else image[..., :3], cmap="gray_r")
        axes.set_title(f"{pair}", fontsize=11)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=100)
