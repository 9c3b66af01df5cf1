"""Charts of a report, as SVG within the page: small, sharp at any size, in the page's own colours, light or dark.

Matplotlib would take a second for them, at the end of every run, and know one background only.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]
Format = Callable[[float], str]

WIDTH, HEIGHT = 400, 240  # of a chart, in its own units; a card of the page is as wide, or somewhat wider
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 34  # around what is drawn
MOST_POINTS = 300  # of a line: more cannot be seen
MOST_CELLS = 40  # of a row, likewise
DASHES = ("", "6 3", "2 3", "8 3 2 3")
COLORS = 7  # of the page, --c0 and so on


@dataclass(frozen=True)
class Line:
    """x, y (n,): points in the order of x; those that are not finite are left out.

    color: a colour of the page, such as --train; raw: pale, with all that lies between the least and the largest, for
    what is noisy; dots: each point is marked.
    """

    name: str
    x: ArrayLike
    y: ArrayLike
    color: str
    dash: str = ""
    raw: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Part:
    """What a bar is made of."""

    name: str
    value: float
    color: str


@dataclass(frozen=True)
class Frame:
    """Where numbers lie in a chart. low, high: the ends of the y axis, and its ticks."""

    x_limits: tuple[float, float]
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def x(self, x: Any) -> Any:
        low, high = self.x_limits
        return LEFT + (x - low) / (high - low or 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, y: Any) -> Any:
        """What lies outside of the axis is drawn just beyond its end."""
        low, high, y = (np.log(value) for value in (self.low, self.high, y)) if self.log else (self.low, self.high, y)
        return HEIGHT - BOTTOM - np.clip((y - low) / (high - low), -0.02, 1.02) * (HEIGHT - BOTTOM - TOP)

    def grid(self, format_y: Format) -> str:
        """The axes and their numbers; x is in epochs."""
        body, (low, high) = "", self.x_limits
        for tick in self.ticks:
            y = self.y(tick)
            body += f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            body += f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{_text(format_y(tick))}</text>'
        for tick in MaxNLocator(6, integer=high - low >= 1, min_n_ticks=1).tick_values(low, high):
            if low - 1e-9 <= tick <= high + 1e-9:
                body += _middle(self.x(tick), HEIGHT - BOTTOM + 14, _number(tick))
        return body + _middle((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "epoch")


def run_color(number: int) -> tuple[str, str]:
    """The colour and the dashes of one run of several."""
    return f"--c{number % COLORS}", DASHES[number // COLORS % len(DASHES)]


def binned(x: ArrayLike, y: ArrayLike, most: int = MOST_POINTS) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """x, and the mean, least and largest y of at most so many bins of neighbours, without what is not finite."""
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    known = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[known], ys[known]
    starts = np.unique(np.linspace(0, len(xs), min(most, len(xs)), endpoint=False).astype(np.int64))
    if not len(starts):
        return xs, ys, ys, ys
    counts = np.diff([*starts, len(xs)])
    means = [np.add.reduceat(values, starts) / counts for values in (xs, ys)]
    return means[0], means[1], np.minimum.reduceat(ys, starts), np.maximum.reduceat(ys, starts)


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_limits: tuple[float, float],
    format_y: Format,
    from_zero: bool = False,
    log: bool = False,
    most: float = math.inf,
    note: str = "",
) -> str:
    """A figure with lines, a legend that tells their last values, and a note; nothing where there are no points.

    log: the y axis is logarithmic, and points that are not above 0 are left out. most: where the y axis ends.
    """
    drawn = [(line, binned(line.x, _above_zero(line.y) if log else line.y)) for line in lines]
    drawn = [(line, points) for line, points in drawn if len(points[0])]
    if not drawn:
        return ""
    low = min(float((points[2] if line.raw else points[1]).min()) for line, points in drawn)
    high = max(float(_robust(points[3]) if line.raw else points[1].max()) for line, points in drawn)
    frame = Frame(x_limits, *_axis(min(0.0, low) if from_zero and not log else low, high, log, most), log)
    body = frame.grid(format_y)
    for line, (x, y, least, largest) in drawn:
        if line.raw:
            band = _points(frame.x(x), frame.y(largest)) + " " + _points(frame.x(x[::-1]), frame.y(least[::-1]))
            body += f'<polygon class="band" style="fill:var({line.color});stroke:var({line.color})" points="{band}"/>'
            continue
        dash = f' stroke-dasharray="{line.dash}"' * bool(line.dash)
        points = _points(frame.x(x), frame.y(y))
        body += f'<polyline class="line" style="stroke:var({line.color})"{dash} points="{points}"/>'
        for a, b in zip(x.tolist(), y.tolist(), strict=True) if len(x) == 1 or (line.dots and len(x) <= 60) else ():
            body += (
                f'<circle cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="2.5" style="fill:var({line.color})">'
                f"<title>{_text(line.name)}: {_text(format_y(b))} at {_number(a)}</title></circle>"
            )
    legend = [(line.name, line.color, line.dash, format_y(_last(line.y))) for line, _ in drawn if not line.raw]
    return figure(title, body, _legend(legend), note)


def area_chart(
    title: str, x: ArrayLike, parts: Sequence[Line], x_limits: tuple[float, float], format_y: Format, note: str
) -> str:
    """Parts of a whole over x, one upon the other, each with its median in the legend; a part has its y alone."""
    values = [np.nan_to_num(np.asarray(part.y, np.float64)) for part in parts]
    pieces = [binned(x, y, 150) for y in values]
    if not len(pieces[0][0]):
        return ""
    xs, heights = pieces[0][0], np.cumsum([piece[1] for piece in pieces], axis=0)
    frame = Frame(x_limits, *_axis(0.0, _robust(heights[-1]), False, math.inf))
    if len(xs) == 1:  # a single step is as wide as the chart
        xs, heights = np.array(frame.x_limits), np.repeat(heights, 2, axis=1)
    body, below = frame.grid(format_y), np.zeros(len(xs))
    for part, top in zip(parts, heights, strict=True):
        shape = _points(frame.x(xs), frame.y(top)) + " " + _points(frame.x(xs[::-1]), frame.y(below[::-1]))
        body += f'<polygon class="area" style="fill:var({part.color})" points="{shape}"/>'
        below = top
    legend = [(part.name, part.color, "", format_y(float(np.median(y)))) for part, y in zip(parts, values, strict=True)]
    return figure(title, body, _legend(legend), note)


def bar_chart(title: str, bars: Sequence[tuple[str, Sequence[Part]]], format_x: Format, note: str = "") -> str:
    """A horizontal bar of parts for each label, with its sum behind it; nothing where all are empty."""
    totals = [sum(part.value for part in parts) for _, parts in bars]
    if not bars or not max(totals) > 0:
        return ""
    rows = []
    for (label, parts), total in zip(bars, totals, strict=True):
        pieces = "".join(
            f'<i style="width:{100 * part.value / max(totals):.2f}%;background:var({part.color})" '
            f'title="{_text(part.name)}: {_text(format_x(part.value))}"></i>'
            for part in parts
            if part.value > 0
        )
        rows.append(f'<tr><th>{_text(label)}</th><td class="bar">{pieces}</td><td>{_text(format_x(total))}</td></tr>')
    names = {part.name: part.color for _, parts in bars for part in parts}
    legend = _legend([(name, color, "", "") for name, color in names.items()]) if len(names) > 1 else ""
    return f'<figure><h3>{_text(title)}</h3>{legend}<table class="bars">{"".join(rows)}</table>{_note(note)}</figure>'


def heat_map(
    title: str, x: ArrayLike, names: Sequence[str], values: NDArray[np.float64], format_value: Format, note: str = ""
) -> str:
    """A row of cells for each name, the darker the larger its values (R, n) are; cell i lies between x[i] and x[i + 1].

    x (n + 1,). Values that are not finite leave their cells empty. Half of the largest and less is palest, so small
    differences look small.
    """
    xs = np.asarray(x, np.float64)
    starts = np.unique(np.linspace(0, len(xs) - 1, min(MOST_CELLS, len(xs) - 1), endpoint=False).astype(np.int64))
    means = np.add.reduceat(values, starts, axis=1) / np.diff([*starts, len(xs) - 1])
    edges, R = [*xs[starts], xs[-1]], len(names)
    every = -(-R // 12)  # of the rows is named: more would overlap
    frame = Frame((edges[0], edges[-1]), 0.0, R, [R - row - 0.5 for row in range(0, R, every)])
    body = frame.grid(lambda y: names[R - int(y) - 1])
    high = float(np.nanmax(means))
    low = min(float(np.nanmin(means)), high / 2)
    for row, cells in enumerate(means):
        top, bottom = frame.y(R - row), frame.y(R - row - 1)
        for left, right, value in zip(edges[:-1], edges[1:], cells.tolist(), strict=True):
            if math.isfinite(value):
                body += (
                    f'<rect x="{frame.x(left):.1f}" y="{top:.1f}" width="{frame.x(right) - frame.x(left):.1f}" '
                    f'height="{bottom - top:.1f}" fill-opacity="{0.1 + 0.9 * (value - low) / (high - low or 1.0):.2f}">'
                    f"<title>{_text(names[row])}: {_text(format_value(value))}</title></rect>"
                )
    return figure(title, f'<g class="heat">{body}</g>', "", note)


def figure(title: str, body: str, legend: str, note: str) -> str:
    """A card of the page with a drawing."""
    return (
        f'<figure><h3>{_text(title)}</h3>{legend}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{_text(title)}">{body}</svg>{_note(note)}</figure>'
    )


def _middle(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{text}</text>'


def _legend(entries: Sequence[tuple[str, str, str, str]]) -> str:
    """(name, colour, dashes, value) of each."""
    keys = []
    for name, color, dash, value in entries:
        kind = "solid" if not dash else "dotted" if dash.startswith("2") else "dashed"
        shown = f" <b>{_text(value)}</b>" if value else ""
        keys.append(f'<span><i style="border-top:3px {kind} var({color})"></i>{_text(name)}{shown}</span>')
    return f'<div class="legend">{"".join(keys)}</div>'


def _note(note: str) -> str:
    return f"<figcaption>{_text(note)}</figcaption>" if note else ""


def _axis(low: float, high: float, log: bool, most: float) -> tuple[float, float, list[float]]:
    """Where an axis begins and ends, and its ticks."""
    if log:
        few = math.log10(high / low) < 1.5
        low, high = _round_down(low), 1 / _round_down(1 / high)
        high = high if high > low else 10 * low
        ticks = LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=6).tick_values(low, high)
    else:
        high = min(high, most)  # before the ticks are chosen, or they would lie above the end
        if high <= low:
            room = abs(high) * 0.1 or 1.0
            low, high = low - room * (low != 0), high + room
        ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        low, high = min(low, float(ticks[0])), min(most, max(high, float(ticks[-1])))
    return low, high, [float(tick) for tick in ticks if low * (1 - 1e-9) - 1e-12 <= tick <= high * (1 + 1e-9)]


def _round_down(value: float) -> float:
    """To 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return power * (5 if value >= 5 * power else 2 if value >= 2 * power else 1)


def _robust(values: Numbers) -> float:
    """The largest that is shown: a single step far above all others would press the rest flat."""
    return float(min(values.max(), 2 * abs(np.quantile(values, 0.98))))


def _above_zero(y: ArrayLike) -> Numbers:
    values = np.asarray(y, np.float64)
    return np.where(values > 0, values, math.nan)


def _last(y: ArrayLike) -> float:
    values = np.asarray(y, np.float64)
    return float(values[np.isfinite(values)][-1])


def _points(x: Numbers | float, y: Numbers | float) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(np.ravel(x).tolist(), np.ravel(y).tolist(), strict=True))


def _number(x: float) -> str:
    return f"{x:,.10g}"


def _text(text: str) -> str:
    return html.escape(text)
