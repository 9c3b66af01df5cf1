"""The report as one HTML page: nothing is loaded from anywhere, so it opens from a disk, is mailed, and prints."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Sequence
from pathlib import Path

from distconv import __version__
from distconv.errors import BadDataError
from distconv.formatting import percent, plural
from distconv.run.files import as_bytes, write_whole
from distconv.run.report.advice import advise
from distconv.run.report.charts import charts
from distconv.run.report.compare import comparison
from distconv.run.report.history import History, read_history
from distconv.run.report.pictures import confusion, variants, wrong_images
from distconv.run.report.tables import epochs_table, facts, starts_table, tiles

PAGE = "report.html"
CSS = Path(__file__).with_name("page.css")
AGAIN = 5  # seconds after which a browser reads the page of a running run again


def write_report(folders: Sequence[Path], path: Path, failure: str = "", writer: str = "") -> Sequence[History]:
    """Write the page of a run, or of several beside each other; returns what was read.

    failure: see read_history; writer: see write_whole.

    Raises MissingInputError where a folder holds no run, BadDataError where its records are none, StorageError.
    """
    histories = [read_history(folder, failure) for folder in folders]
    try:
        content = as_bytes(page(histories))
    except (LookupError, TypeError, ValueError, ArithmeticError, OSError) as error:  # OSError: of a time without a date
        names = ", ".join(str(folder / "metrics.jsonl") for folder in folders)
        raise BadDataError(f"{names}: records of a run were expected, but they have another shape ({error})") from None
    write_whole(path, content, writer)
    return histories


def page(histories: Sequence[History]) -> str:
    """The page as text."""
    one = len(histories) == 1
    title = heading(histories[0]) if one else f"{len(histories)} runs of distconv"
    running = any(history.status == "running" for history in histories)
    body = single(histories[0]) if one else f"<h1>{html.escape(title)}</h1>{comparison(histories)}"
    refresh = f'<meta http-equiv="refresh" content="{AGAIN}">' * running
    written = f"written by distconv {__version__}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"{refresh}<style>{CSS.read_text(encoding='utf-8')}</style></head>\n<body><main>{body}"
        f'<p class="soft">{written}</p></main></body></html>\n'
    )


def heading(history: History) -> str:
    """The run in a few words."""
    model, data, ranks = history.start.get("model"), history.start.get("data"), history.ranks
    score = "" if math.isnan(history.score) else f": {percent(history.score)} test {history.metric}"
    return f"{model} on {data}, {plural(ranks, 'rank')}{score}"


def single(history: History) -> str:
    """All of one run."""
    parts = [
        f"<h1>{html.escape(heading(history))}</h1>",
        f'<p><span class="status {history.status.split()[0]}">{history.status}</span> '
        f'<span class="soft">{html.escape(history.folder.absolute().name)}</span></p>',
    ]
    parts += [f'<pre class="card failed">{html.escape(failure)}</pre>' for failure in history.failures]
    parts.append(tiles(history))
    if advice := advise(history):
        sentences = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in advice)
        parts.append(f'<h2>What to try next</h2><div class="card next">{sentences}</div>')
    parts += [f'<h2>{name}</h2><div class="grid2">{"".join(found)}</div>' for name, found in charts(history) if found]
    if samples := history.samples:
        parts.append(
            confusion(samples) + wrong_images(samples) + variants(samples, str(history.settings.get("augment") or "…"))
        )
    parts.append(f"<h2>Starts</h2>{starts_table(history)}")
    parts.append(f"<h2>What was run</h2>{facts(history)}")
    if history.epochs:
        parts.append(f"<h2>Epochs</h2>{epochs_table(history)}")
    return "".join(parts)
