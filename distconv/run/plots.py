"""Pictures: the curves of a run, the grid of mistakes, what is taken for what. Drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from distconv.comm.world import World
from distconv.data.dataset import Images
from distconv.errors import CannotCreateError

Counts = NDArray[np.int64]
MOST_COUNTED = 40  # classes of a matrix whose counts can be read

matplotlib.rcdefaults()  # a user's own settings may need what is not there, as LaTeX
matplotlib.rcParams["text.parse_math"] = False  # a folder or a class may have a $ in its name


def draw_png(path: Path, draw: Callable[[], None]) -> None:
    """Draw what --png asks for. Raises CannotCreateError."""
    try:
        draw()
    except OSError as error:
        raise CannotCreateError(f"--png {path} cannot be written: {error.strerror}") from None


def draw_on_one_rank(world: World, path: Path, draw: Callable[[], None]) -> None:
    """Have rank 0 draw what --png asks for; collective. Raises CannotCreateError on all ranks."""
    with world.together():
        if world.rank == 0:
            draw_png(path, draw)


def draw_curves(records: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Loss and scores of each epoch, from the records of metrics.jsonl, as a PNG."""
    epochs = [record for record in records if record.get("event") == "epoch"]
    number = [record.get("epoch") or 0 for record in epochs]
    metric = next((record["metric"] for record in records if record.get("metric")), "accuracy")
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, score = figure.subplots(1, 2)
    figure.suptitle(title)
    loss.plot(number, [record.get("train_loss") for record in epochs], "o-", color="tab:blue")
    loss.set(title="loss in training", xlabel="epoch", ylabel="mean over the samples")
    loss.set_ylim(bottom=0)
    for part, label, color in (
        ("train", "training", "tab:gray"), ("validation", "validation", "tab:purple"), ("test", "test", "tab:orange"),
        ("ema_test", "test, averaged weights", "tab:blue"),
    ):  # fmt: skip
        scores = [record.get(f"{part}_{metric}") for record in epochs]
        if part in ("train", "test") or any(scores):
            score.plot(number, scores, "o-", color=color, label=label)
    score.set(title=f"{metric} in evaluation", xlabel="epoch")
    score.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
    score.legend()
    for axes in (loss, score):
        if number:
            axes.set_xlim(number[0] - 0.5, number[-1] + 0.5)  # a single epoch would get fractions of epochs beside it
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_mistakes(images: Images, captions: Sequence[str], title: str, path: Path) -> None:
    """Images (N, H, W, C) in a grid, each under its caption, as a PNG; N may be 0.

    A column is as wide as the longest line of a caption.
    """
    count = len(images)
    columns = min(count, max(5, math.ceil(math.sqrt(count)))) or 1
    rows = math.ceil(count / columns)
    lines = [line for caption in captions for line in caption.splitlines()]
    widest = max((_inches(line, 10) for line in lines), default=0.0)
    figure = Figure(figsize=(max(8.0, max(1.6, widest + 0.2) * columns), 0.6 + 1.9 * rows), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False) if count else np.empty((0, 0), object)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, caption in zip(grid.flat, images, captions, strict=False):
        axes.imshow(image[..., 0] if image.shape[-1] == 1 else image[..., :3], cmap="gray_r")
        axes.set_title(caption, fontsize=10)
    _save(figure, path)


def draw_confusion(matrix: Counts, class_names: Sequence[str] | None, title: str, path: Path) -> None:
    """How many images of each label, a row, got each inference, a column (classes, classes), as a PNG.

    Classes stand there by their names, or by their numbers where they have none, or are many. The colour goes with the
    logarithm of the count, or the few errors would be as white as none.
    """
    classes = len(matrix)
    counted = classes <= MOST_COUNTED
    side = max(4.5, 0.45 * classes) if counted else 9.0
    names = class_names if counted and class_names else ()
    room = max((_inches(name, 10) for name in names), default=0.0)
    figure = Figure(figsize=(side + 0.5 + room, side + 1.0 + room), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    shade = np.log1p(matrix) / np.log1p(max(1, matrix.max()))
    axes.imshow(shade, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="inference", ylabel="label")
    axes.tick_params(which="both", length=0)
    if counted:
        axes.set(xticks=range(classes), yticks=range(classes))
        if names:
            axes.set_xticklabels(names, rotation=90)
            axes.set_yticklabels(names)
        axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="0.85", linewidth=0.5)
        for label, inference in np.argwhere(matrix):
            color = "white" if shade[label, inference] > 0.6 else "black"
            count = matrix[label, inference]
            axes.text(inference, label, count, ha="center", va="center", color=color, fontsize=9 - 2 * (count > 9999))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


def draw_augmented(rows: Sequence[Sequence[Images]], title: str, path: Path) -> None:
    """A grid of images (H, W, C) from 0 to 1, of which each row begins with one that was not changed, as a PNG."""
    height, width = rows[0][0].shape[:2]
    figure = Figure(figsize=(0.9 * len(rows[0]), 0.9 * len(rows) * height / width + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for row, images in zip(grid, rows, strict=True):
        for axes, image in zip(row, images, strict=True):
            axes.imshow(
                image[..., 0] if image.shape[-1] == 1 else image[..., :3].clip(0, 1), cmap="gray_r", vmin=0, vmax=1
            )
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("tab:blue" if axes is row[0] else "lightgray")
            axes.spines[:].set_linewidth(2 if axes is row[0] else 0.5)
    _save(figure, path)


def draw_scaling(rungs: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Images a second on each number of ranks beside the ideal line, and the parts of a step, as a PNG.

    A rung has the keys that `bench scaling --json` prints.
    """
    numbers = [rung["ranks"] for rung in rungs]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    speed, split = figure.subplots(1, 2)
    figure.suptitle(title)
    per_rank = rungs[0]["images_per_second"] / numbers[0]
    speed.plot(numbers, [per_rank * P for P in numbers], "--", color="tab:gray", label="ideal")
    speed.plot(numbers, [rung["images_per_second"] for rung in rungs], "o-", color="tab:blue", label="measured")
    crowded = [rung for rung in rungs if rung["oversubscribed"]]
    if crowded:
        places = [rung["ranks"] for rung in crowded], [rung["images_per_second"] for rung in crowded]
        speed.plot(*places, "o", color="tab:blue", markerfacecolor="white", label="more ranks than cores")
    speed.set(title="images/s", xlabel="ranks", xticks=numbers)
    speed.set_ylim(bottom=0)
    speed.margins(x=0.12)
    speed.grid(alpha=0.3)
    speed.legend(loc="upper left")

    labels, bottom = [str(P) for P in numbers], [0.0] * len(numbers)
    parts = ("compute", "tab:blue"), ("exchange", "tab:orange"), ("wait", "tab:red"), ("step", "tab:gray")
    for part, color in parts:
        top = [1e3 * rung[f"{part}_seconds"] for rung in rungs]
        if part != "step":
            top = [low + height for low, height in zip(bottom, top, strict=True)]
        height = [max(0.0, high - low) for high, low in zip(top, bottom, strict=True)]
        label = {"exchange": "wire", "step": "rest"}.get(part, part)
        split.bar(labels, height, bottom=bottom, color=color, width=0.6, label=label)
        bottom = top
    split.set(title="one step of rank 0, ms", xlabel="ranks")
    split.grid(alpha=0.3, axis="y")
    split.set_axisbelow(True)
    split.legend(loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def draw_step(steps: Sequence[tuple[int, Mapping[tuple[str, str], float]]], title: str, path: Path) -> None:
    """Where the time of a step goes: for each batch size the seconds of its parts, (layer, pass) or (name, ""), as PNG.

    The first line of the picture is the first layer.
    """
    figure = Figure(figsize=(1.5 + 4.5 * len(steps), 5.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    for axes, (batch_size, parts) in zip(panels, steps, strict=True):
        names = list(dict.fromkeys(name for name, _ in parts))
        total = 1e3 * sum(parts.values())
        digits = 1 if total >= 10 else 3  # a GPU's steps take less than a millisecond
        left = [0.0] * len(names)
        for half, color in (("forward", "tab:blue"), ("backward", "tab:orange"), ("", "tab:gray")):
            width = [1e3 * parts.get((name, half), 0.0) for name in names]
            axes.barh(names, width, left=left, color=color, label=half or "neither")
            left = [start + length for start, length in zip(left, width, strict=True)]
        for name, end in zip(names, left, strict=True):
            axes.annotate(f"{end:.{digits}f}", (end, name), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set(title=f"batch {batch_size}: {total:.{digits}f} ms a step on rank 0", xlabel="ms")
        axes.set_xlim(right=1.12 * max(left))
        axes.margins(y=0.02)
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
    panels[0].invert_yaxis()
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))  # outside: any bar may be the long one
    _save(figure, path)


def _inches(text: str, points: int) -> float:
    """How wide a line of text is in a font of this size."""
    return float(TextPath((0, 0), text, size=points).get_extents().width) / 72 if text else 0.0


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=100)
