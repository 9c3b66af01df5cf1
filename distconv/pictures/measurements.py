"""What the benchmarks have measured: the scaling over ranks, the parts of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from distconv.pictures.style import BLUE, COLORS, GRAY, save


def draw_scaling(rungs: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Images a second on each number of ranks beside the ideal line, and the parts of a step, as a PNG.

    A rung has the keys that `bench scaling --json` prints.
    """
    numbers = [rung["ranks"] for rung in rungs]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    speed, split = figure.subplots(1, 2)
    figure.suptitle(title)
    per_rank = rungs[0]["images_per_second"] / numbers[0]
    speed.plot(numbers, [per_rank * P for P in numbers], "--", color=GRAY, label="ideal")
    speed.plot(numbers, [rung["images_per_second"] for rung in rungs], "o-", color=BLUE, label="measured")
    crowded = [rung for rung in rungs if rung["oversubscribed"]]
    if crowded:
        places = [rung["ranks"] for rung in crowded], [rung["images_per_second"] for rung in crowded]
        speed.plot(*places, "o", color=BLUE, markerfacecolor="white", label="more ranks than cores")
    speed.set(title="images/s", xlabel="ranks", xticks=numbers)
    speed.set_ylim(bottom=0)
    speed.margins(x=0.12)
    speed.grid(alpha=0.3)
    speed.legend(loc="upper left")

    labels, bottom = [str(P) for P in numbers], [0.0] * len(numbers)
    for part in ("compute", "exchange", "wait", "step"):
        top = [1e3 * rung[f"{part}_seconds"] for rung in rungs]
        if part != "step":
            top = [low + height for low, height in zip(bottom, top, strict=True)]
        height = [max(0.0, high - low) for high, low in zip(top, bottom, strict=True)]
        part = {"step": "rest"}.get(part, part)
        split.bar(labels, height, bottom=bottom, color=COLORS[part], width=0.6, label=part)
        bottom = top
    split.set(title="one step of rank 0, ms", xlabel="ranks")
    split.grid(alpha=0.3, axis="y")
    split.set_axisbelow(True)
    split.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


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
        for half in ("forward", "backward", ""):
            width = [1e3 * parts.get((name, half), 0.0) for name in names]
            axes.barh(names, width, left=left, color=COLORS[half or "rest"], label=half or "neither")
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
    save(figure, path)
