"""What all pictures have in common: colours that colour-blind eyes tell apart, and how a file is written.

Drawn without a display. The colours are those of M. Okabe and K. Ito, "Color Universal Design" (2008).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

from distconv.comm.world import World
from distconv.errors import CannotCreateError

BLUE, ORANGE, RED, GREEN, PINK, SKY, GRAY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F"
# One thing has one colour in every picture.
COLORS = {
    "train": BLUE,
    "test": RED,
    "validation": GREEN,
    "ema_test": PINK,
    "compute": BLUE,
    "exchange": ORANGE,
    "wait": PINK,
    "forward": SKY,
    "backward": BLUE,
    "rest": GRAY,
}

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


def inches(text: str, points: int) -> float:
    """How wide a line of text is in a font of this size."""
    return float(TextPath((0, 0), text, size=points).get_extents().width) / 72 if text else 0.0


def save(figure: Figure, path: Path) -> None:
    """Write a PNG. Raises OSError."""
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=100)
