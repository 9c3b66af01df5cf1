"""What a model sees and answers: the grid of mistakes, what is taken for what, images changed at random."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from distconv.data.dataset import Images
from distconv.pictures.style import BLUE, SMALL, head, inches

Counts = NDArray[np.int64]
MOST_COUNTED = 40  # classes of a matrix whose counts can be read


def draw_mistakes(images: Images, captions: Sequence[str], title: str, note: str = "") -> Figure:
    """Images (N, H, W, C) in a grid, each under its caption, which the note explains; N may be 0.

    A column is as wide as the longest line of a caption. Floats beyond 0 to 1 are brought into it, all in the same way.
    """
    count = len(images)
    if images.dtype != np.uint8:
        low, high = images.min(initial=0.0), images.max(initial=1.0)
        images = (images - low) / (high - low)
    columns = min(count, max(5, math.ceil(math.sqrt(count)))) or 1
    rows = math.ceil(count / columns)
    lines = [line for caption in captions for line in caption.splitlines()]
    widest = max((inches(line, SMALL) for line in lines), default=0.0)
    figure = Figure(figsize=(max(8.0, max(1.6, widest + 0.2) * columns), 1.1 + 1.9 * rows))
    head(figure, title, [note] if note else [])
    grid = figure.subplots(rows, columns, squeeze=False) if count else np.empty((0, 0), object)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    for axes, image, caption in zip(grid.flat, images, captions, strict=False):
        axes.imshow(_visible(image), cmap="gray_r")
        axes.set_title(caption, fontsize=SMALL)
        framed(axes)
    return figure


def draw_confusion(matrix: Counts, class_names: Sequence[str] | None, title: str, note: str = "") -> Figure:
    """How many images of each label, a row, got each inference, a column (classes, classes).

    Classes stand there by their names, or by their numbers where they have none, or are many. The colour goes with the
    logarithm of the count, or the few errors would be as white as none.
    """
    classes = len(matrix)
    counted = classes <= MOST_COUNTED
    side = max(4.5, 0.45 * classes) if counted else 9.0
    names = class_names if counted and class_names else ()
    room = max((inches(name, 11) for name in names), default=0.0)
    figure = Figure(figsize=(side + 0.5 + room, side + 1.2 + room))
    head(figure, title, [note] if note else [])
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
    return figure


def draw_augmented(rows: Sequence[Sequence[Images]], title: str) -> Figure:
    """A grid of images (H, W, C) from 0 to 1, of which each row begins with one that was not changed."""
    height, width = rows[0][0].shape[:2]
    figure = Figure(figsize=(0.9 * len(rows[0]), 0.9 * len(rows) * height / width + 0.6))
    head(figure, title)
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for row, images in zip(grid, rows, strict=True):
        for axes, image in zip(row, images, strict=True):
            axes.imshow(_visible(image).clip(0, 1), cmap="gray_r", vmin=0, vmax=1)
            framed(axes)
        row[0].spines[:].set(color=BLUE, linewidth=2)
    return figure


def _visible(image: Images) -> Images:
    """What can be drawn of an image (H, W, C): three channels as colours, or of fewer the first."""
    return image[..., :3] if image.shape[-1] >= 3 else image[..., 0]


def framed(axes: Axes) -> None:
    """A thin line around an image: its own edge may be as white as the page."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="lightgray", linewidth=0.5)
