"""What has been measured, or predicted: scaling over ranks, the parts of a step, the exchange, what ranks change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter, StrMethodFormatter

from distconv.pictures.style import BESIDE, BLUE, COLORS, GRAY, RED, by_powers, head, inches

Rows = Sequence[Mapping[str, Any]]
CARRIERS: dict[str, tuple[str, Any]] = {
    "mpi": ("s", "--"),
    "flat": ("o", "-"),
    "two-level": ("^", "-."),
    "buckets": ("D", ":"),
}
MPI_FLOAT32 = ("mpi", "float32")  # what a user would have without us


def draw_scaling(rungs: Rows, title: str) -> Figure:
    """Images a second on each number of ranks beside the ideal line, and the parts of a step.

    A rung has the keys that `bench scaling --json` prints.
    """
    numbers = [rung["ranks"] for rung in rungs]
    figure = Figure(figsize=(11, 4.4))
    speed, split = figure.subplots(1, 2)
    per_rank = rungs[0]["images_per_second"] / numbers[0]
    speed.plot(numbers, [per_rank * P for P in numbers], "--", color=GRAY, label="ideal")
    speed.plot(numbers, [rung["images_per_second"] for rung in rungs], "o-", color=BLUE, label="measured")
    crowded = [rung for rung in rungs if rung["oversubscribed"]]
    if crowded:
        places = [rung["ranks"] for rung in crowded], [rung["images_per_second"] for rung in crowded]
        speed.plot(*places, "o", color=BLUE, markerfacecolor="white", label="more ranks than cores")
    speed.set(title="images/s", xlabel="ranks")
    if numbers[-1] > 8 * numbers[0]:  # the first ones would lie upon each other
        on_powers(speed)
    else:
        speed.set_xticks(numbers)
        speed.set_ylim(bottom=0)
        speed.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
        speed.margins(x=0.12)
    speed.grid()
    speed.legend(loc="upper left")

    labels, bottom = [f"{P:,}" for P in numbers], [0.0] * len(numbers)
    for part in ("compute", "exchange", "wait", "step"):
        top = [1e3 * rung[f"{part}_seconds"] for rung in rungs]
        if part != "step":
            top = [low + height for low, height in zip(bottom, top, strict=True)]
        height = [max(0.0, high - low) for high, low in zip(top, bottom, strict=True)]
        part = {"step": "rest"}.get(part, part)
        split.bar(labels, height, bottom=bottom, color=COLORS[part], width=0.6, label=part)
        bottom = top
    split.set(title="one step of rank 0, ms", xlabel="ranks")
    turn(split, labels)
    split.grid(axis="y")
    split.legend(**BESIDE)
    head(figure, title)
    return figure


def draw_step(steps: Sequence[tuple[int, Mapping[tuple[str, str], float]]], title: str) -> Figure:
    """Where the time of a step goes: for each batch size the seconds of its parts, (layer, pass) or (name, "").

    The first line of the picture is the first layer.
    """
    lines = max(len({name for name, _ in parts}) for _, parts in steps)
    figure = Figure(figsize=(1.8 + 4.8 * len(steps), max(4.5, 1.5 + 0.27 * lines)))
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
            axes.annotate(f"{end:.{digits}f}", (end, name), (3, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set(title=f"batch {batch_size}: {total:.{digits}f} ms a step on rank 0", xlabel="ms")
        axes.set_xlim(right=1.12 * max(left))
        axes.margins(y=0.02)
        axes.grid(axis="x")
    panels[0].invert_yaxis()
    panels[-1].legend(**BESIDE)  # any bar may be the long one
    head(figure, title)
    return figure


def draw_exchange(rows: Rows, title: str) -> Figure:
    """Time against elements of each carrier and wire, and its ratio to MPI's float32 Allreduce of the same size.

    A row has the keys that `bench exchange --json` prints; each size has one of MPI's float32.
    """
    figure = Figure(figsize=(12, 4.8))
    time, ratio = figure.subplots(1, 2)
    base = {row["elements"]: row["median_seconds"] for row in rows if (row["carrier"], row["wire"]) == MPI_FLOAT32}
    for carrier, wire in dict.fromkeys((row["carrier"], row["wire"]) for row in rows):
        mine = sorted(
            (row["elements"], row["median_seconds"]) for row in rows if (row["carrier"], row["wire"]) == (carrier, wire)
        )
        sizes = [size for size, _ in mine]
        marker, dashes = CARRIERS[carrier]
        look = {"marker": marker, "linestyle": dashes, "color": COLORS[wire], "label": f"{carrier} {wire}"}
        if carrier == "mpi":
            look["markerfacecolor"] = "white"
        time.plot(sizes, [1e3 * seconds for _, seconds in mine], **look)
        ratio.plot(sizes, [seconds / base[size] for size, seconds in mine], **look)
    time.set_yscale("log")
    ratio.set_yscale("log", base=2)
    low, high = ratio.get_ylim()
    ratio.set_ylim(min(low, 0.4), max(high, 2.5))
    for axes, name in ((time, "time, ms"), (ratio, "times MPI's float32: below 1 is faster")):
        axes.set_xscale("log", base=2)
        ticks = well_apart(sorted(base))
        axes.set(title=name, xlabel="elements", xticks=ticks, xlim=(min(base) / 1.4, 1.4 * max(base)))
        axes.set_xticklabels([binary(size) for size in ticks], rotation=45, ha="right", rotation_mode="anchor")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid()
    by_powers(time.yaxis)
    ratio.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ratio.legend(**BESIDE)
    head(figure, title)
    return figure


def well_apart(sizes: Sequence[int]) -> list[int]:
    """Those of the ascending sizes whose labels have room on an axis of powers."""
    kept: list[int] = []
    for size in sizes:
        if not kept or size >= 1.6 * kept[-1]:
            kept.append(size)
    return kept


def binary(size: int) -> str:
    """4194304 as 4Mi, as a command line takes it."""
    for unit, name in ((1 << 20, "Mi"), (1 << 10, "Ki")):
        if size % unit == 0:
            return f"{size // unit}{name}"
    return f"{size:,}"


def draw_prediction(rows: Rows, title: str) -> Figure:
    """Images a second on each number of ranks beside the ideal line, and what a step is made of, for each wire.

    A row has the keys that `bench predict --json` prints. What of an exchange is hidden lies within the computation.
    """
    wires = list(dict.fromkeys(row["wire"] for row in rows))
    figure = Figure(figsize=(14, 4.6))
    speed, *panels = figure.subplots(1, 1 + len(wires), width_ratios=[1.2, *[1] * len(wires)])
    numbers = sorted({row["ranks"] for row in rows})
    one_rank = rows[0]["images_per_second"] / rows[0]["efficiency"] / rows[0]["ranks"]
    speed.plot(numbers, [one_rank * P for P in numbers], "--", color=GRAY, label="ideal")
    for wire, marker, axes in zip(wires, "so", panels, strict=True):
        mine = [row for row in rows if row["wire"] == wire]
        speed.plot(numbers, [row["images_per_second"] for row in mine], marker=marker, color=COLORS[wire], label=wire)
        draw_shares(axes, mine, f"parts of a step, {wire}")
    speed.set(title="images/s", xlabel="ranks")
    on_powers(speed)
    speed.grid()
    speed.legend(loc="upper left")
    panels[-1].legend(**BESIDE, reverse=True)
    head(figure, title)
    return figure


def on_powers(speed: Axes) -> None:
    """Ranks and images/s on axes of powers, where the ideal line is straight, too."""
    speed.set_xscale("log", base=2)
    speed.set_yscale("log")
    speed.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    by_powers(speed.yaxis, "{x:,.0f}")


def turn(axes: Axes, labels: Sequence[str]) -> None:
    """Upright labels of bars, where they would not have room side by side."""
    axes.tick_params(axis="x", rotation=90 if max(map(len, labels)) * len(labels) > 20 else 0)


def draw_shares(axes: Axes, rows: Rows, title: str) -> None:
    """Of the time of a step on each number of ranks: computing alone, with a hidden exchange, and exchanging alone."""
    labels = [f"{row['ranks']:,}" for row in rows]
    exposed = [row["exposed_seconds"] for row in rows]
    hidden = [row["exchange_seconds"] - row["exposed_seconds"] for row in rows]
    alone = [row["compute_seconds"] - under for row, under in zip(rows, hidden, strict=True)]
    step = [row["compute_seconds"] + row["exposed_seconds"] for row in rows]
    bottom = [0.0] * len(rows)
    for seconds, label, color, hatch in (
        (alone, "compute", COLORS["compute"], ""),
        (hidden, "compute,\nexchange hidden", COLORS["compute"], "///"),
        (exposed, "exchange exposed", COLORS["exchange"], ""),
    ):
        shares = [part / whole for part, whole in zip(seconds, step, strict=True)]
        axes.bar(
            labels, shares, bottom=bottom, color=color, hatch=hatch, edgecolor=COLORS["exchange"], linewidth=0,
            label=label
        )  # fmt: skip
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axes.set(title=title, xlabel="ranks", ylim=(0, 1))
    turn(axes, labels)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def draw_proof(rows: Rows, title: str) -> Figure:
    """The largest relative difference of each wire and number of ranks, against the wire's bound.

    A row has the keys that `prove --json` prints. No difference at all stands at the bottom, as powers have no 0.
    """
    wires, ranks = (list(dict.fromkeys(row[key] for row in rows)) for key in ("wire", "ranks"))
    found = [row[key] for row in rows for key in ("max_relative_difference", "bound")]
    least, most = min(filter(None, found), default=1e-16), max(*found, 1e-16)
    zero = least / 100
    place = max(0.35, inches(str(max(ranks)), 11) + 0.08)
    figure = Figure(figsize=(max(8.0, 2.5 + len(wires) * (0.5 + place * len(ranks))), 4.8))
    axes = figure.subplots()
    places = [wires.index(row["wire"]) * (len(ranks) + 1) + ranks.index(row["ranks"]) for row in rows]
    for good, mark, color, label in ((True, "o", BLUE, "difference"), (False, "X", RED, "BROKEN")):
        mine = [(x, row["max_relative_difference"]) for x, row in zip(places, rows, strict=True) if row["ok"] == good]
        if mine:
            axes.plot([x for x, _ in mine], [y or zero for _, y in mine], mark, color=color, markersize=9, label=label)
    bounds = [row["bound"] or zero for row in rows]
    axes.hlines(bounds, [x - 0.5 for x in places], [x + 0.5 for x in places], color="black", label="bound")
    for number, wire in enumerate(wires):
        middle = number * (len(ranks) + 1) + (len(ranks) - 1) / 2
        axes.text(middle, -0.09, wire, transform=axes.get_xaxis_transform(), ha="center", va="top", weight="bold")
    axes.set(title="largest relative difference of a gradient tensor", xticks=places, yscale="log")
    axes.set_xticklabels([row["ranks"] for row in rows])
    axes.tick_params(axis="x", length=0)
    axes.text(1.01, -0.03, "ranks", transform=axes.transAxes, va="top")
    powers = range(math.ceil(math.log10(least / 5)), math.floor(math.log10(most * 10)) + 1)  # as far as the axis goes
    ticks = {10.0**power: f"1e{power}" for power in powers[:: math.ceil(len(powers) / 8) or 1]}
    ticks |= {zero: "0"} if 0 in found else {}
    axes.set_yticks([*ticks], [*ticks.values()])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim((zero if 0 in found else least) / 5, most * 10)
    axes.grid(axis="y")
    axes.legend(**BESIDE)
    head(figure, title)
    return figure
