"""What all pictures have in common: colours that colour-blind eyes tell apart, and how a file is written.

Drawn without a display. The colours are those of M. Okabe and K. Ito, "Color Universal Design" (2008).
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from distconv.comm.world import World
from distconv.errors import CannotCreateError

BLUE, ORANGE, RED, GREEN, PINK, SKY, GRAY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F"
# One thing has one colour in every picture.
COLORS = {
    "train": BLUE,
    "test": RED,
    "validation": GREEN,
    "ema_test": PINK,
    "ema_validation": SKY,
    "compute": BLUE,
    "exchange": ORANGE,
    "wait": PINK,
    "forward": SKY,
    "backward": BLUE,
    "rest": GRAY,
    "float16": RED,
    "float32": BLUE,
    "float64": SKY,
    "int8": GREEN,
    "int16": PINK,
    "int32": ORANGE,
}
SMALL, LARGE = 10, 13  # points of a note, and of the title
BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}  # where it hides nothing
DPI = 150  # a picture is read at half its size, too

matplotlib.rcdefaults()  # a user's own settings may need what is not there, as LaTeX
matplotlib.rcParams |= {
    "text.parse_math": False,  # a folder or a class may have a $ in its name
    "font.size": 11,
    "axes.titlesize": 12,
    "figure.titlesize": LARGE,
    "legend.fontsize": SMALL,
    "lines.linewidth": 2,
    "lines.markersize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "0.85",
    "figure.constrained_layout.use": True,
}


def draw_png(path: Path, draw: Callable[[], Figure]) -> None:
    """Write what --png asks for. Raises CannotCreateError."""
    try:
        save(draw(), path)
    except OSError as error:
        raise CannotCreateError(f"--png {path} cannot be written: {error.strerror or error}") from None


def draw_on_one_rank(world: World, path: Path, draw: Callable[[], Figure]) -> None:
    """Have rank 0 write what --png asks for; collective. Raises CannotCreateError on all ranks."""
    world.on_rank_0(lambda: draw_png(path, draw))


def inches(text: str, points: int) -> float:
    """How wide a line of text is in a font of this size."""
    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=points), ismath=False)
    return float(width) / 72


def head(figure: Figure, title: str, notes: Sequence[str] = ()) -> None:
    """The title above all, and notes below, each line as long as the figure is wide."""
    width = figure.get_size_inches()[0] - 0.5
    figure.suptitle(_wrapped(title, width, LARGE))
    if notes:
        figure.supxlabel("\n".join(_wrapped(note, width, SMALL) for note in notes), fontsize=SMALL, color="0.3")


def _wrapped(text: str, width: float, points: int) -> str:
    """The lines of a text, broken where they are wider than so many inches."""
    lines = []
    for line in text.splitlines():
        letters = len(line) * width / max(width, inches(line, points))  # that have room, if all are as wide as the mean
        lines.append(textwrap.fill(line, max(10, int(letters))))
    return "\n".join(lines)


def by_powers(axis: Axis, form: str = "{x:g}") -> None:
    """Label an axis in plain numbers, as many as have room: powers would need parse_math. What is drawn stands by then.

    Those are 1, 2 and 5 of each power of ten; over more than three of them, powers alone, of which some may be left
    out: a locator that leaves out powers labels nothing between them.
    """
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high <= 1000 * low else (1.0,), numticks=8))
    axis.set_major_formatter(StrMethodFormatter(form))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> None:
    """Write a PNG. Raises OSError."""
    figure.dpi = DPI
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(path)  # Figure.savefig would lay it out and draw it twice
