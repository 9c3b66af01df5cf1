"""The figures of one run that people ask for first, and its tables."""

from __future__ import annotations

import html
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from distconv.formatting import amount, duration, in_bytes, loss, milliseconds, percent, plural, short
from distconv.run.noise import over_a_run
from distconv.run.report.charts import MOST_RANKS, SCORES
from distconv.run.report.history import History

MOST_EPOCHS = 200  # rows of a table


def tiles(history: History) -> str:
    """Score, speed, and what they took."""
    parts = {part: history.median(f"{part}_seconds") for part in ("compute", "exchange", "wait")}
    speed, ranks = history.median("images_per_second"), plural(history.ranks, "rank")
    peak = (history.final or {}).get("peak_memory_bytes")
    entries = []
    if not math.isnan(history.score):
        entries.append((f"test {history.metric}", percent(history.score), _of_what(history)))
    step = history.step_seconds
    if step > 0:
        shares = ", ".join(f"{part} {seconds / step:.0%}" for part, seconds in parts.items())
        entries.append(("images/s", f"{speed:,.0f}", f"median, {ranks}"))
        entries.append(("a step", milliseconds(1e3 * step), f"of it on rank 0 {shares}"))
    planned = history.start.get("steps") or 0
    entries.append(("steps", f"{history.last_step:,}", f"of {planned:,}, {history.batch_size:,} images each"))
    if history.ranks > 1:
        sent = float(np.max(history.steps_of_now("wire_bytes"), initial=0))
        alone = f"float32 by itself would take {milliseconds(1e3 * history.median('wire_seconds_float32'))}"
        entries.append(("sent in a step", in_bytes(sent), f"by rank 0, {history.start.get('wire')}; {alone}"))
    starts = plural(len(history.attempts), "start")
    entries.append(("time", duration(history.seconds), f"goodput {history.goodput:.0%}, {starts}"))
    scale, error = over_a_run(history.epochs, history.batch_size)
    if scale > 0:
        known_to = "" if math.isnan(error) else f" ± {error:.0%}"
        entries.append(("noise scale", short(scale) + known_to, f"images, over the run; batch {history.batch_size:,}"))
    if memory := peak or history.start.get("memory_bytes"):
        entries.append(("memory", in_bytes(memory), "of rank 0, peak" if peak else "of rank 0, expected"))
    shown = "".join(
        f'<div class="tile">{html.escape(name)}<b>{html.escape(value)}</b><small>{html.escape(note)}</small></div>'
        for name, value, note in entries
    )
    return f'<div class="tiles">{shown}</div>'


def _of_what(history: History) -> str:
    """What the score was taken of."""
    final = history.final
    if not final:
        return "after the last epoch"
    if history.judged == "test":
        return f"{amount(final.get('correct') or 0)} of {amount(final.get('total') or 0)}"
    raw = final.get(f"test_{history.metric}")
    return "averaged weights" + (f"; those of the last step {percent(raw)}" if raw is not None else "")


def starts_table(history: History) -> str:
    """Each start, how far it came, how it ended, and how much time an accident had taken before it."""
    rows = []
    for attempt in history.attempts:
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(attempt.start.get("time") or 0)))
        steps = f"{attempt.start.get('resumed_step') or 0:,} to {attempt.last_step:,}"
        lost = duration(attempt.lost) if attempt.lost else ""
        rows.append([
            begun, str(attempt.start.get("ranks") or ""), steps, duration(attempt.seconds), attempt.end, lost
        ])  # fmt: skip
    head = ["started", "ranks", "steps that count", "time", "end", "lost before it"]
    return f'<div class="card scroll">{table(head, rows)}</div>'


def facts(history: History) -> str:
    """What makes the run the same again."""
    start = history.start
    versions: Any = start.get("versions")
    hosts = Counter(map(str, start.get("hostnames") or []))
    images = f"{start.get('train_images') or 0:,} training and {start.get('test_images') or 0:,} test images"
    digest = next((r["parameters_sha256"] for r in reversed(history.records) if r.get("parameters_sha256")), "")
    entries: dict[str, Any] = {
        "command": history.command or "not known: there is no config.toml that this version can read",
        "data": f"{start.get('data')}, {images}, SHA-256 {start.get('data_sha256')}",
        "model": f"{start.get('model')}, {start.get('parameter_count') or 0:,} parameters",
        "ranks": f"{history.ranks}, each on {start.get('device')} in {start.get('precision')}",
        "hosts": ", ".join(f"{host} ({plural(count, 'rank')})" for host, count in hosts.most_common(MOST_RANKS)),
        "exchange": f"{start.get('exchange')}, {start.get('wire')} on the wire" if history.ranks > 1 else "",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items())
        if isinstance(versions, dict)
        else "",
        "parameters": digest and f"SHA-256 {digest}",
        "folder": os.path.abspath(history.folder),  # noqa: PTH100 (resolve would follow links)
    }
    rows = "".join(f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in entries.items() if value)
    return f'<div class="card"><table class="facts">{rows}</table></div>'


def epochs_table(history: History) -> str:
    """Losses and scores of each epoch."""
    of_parts = {name: history.per_epoch(f"{part}_{history.metric}") for part, name, *_ in SCORES}
    scores = {name: values for name, values in of_parts.items() if np.isfinite(values).any()}
    columns = history.per_epoch("epoch"), history.per_epoch("train_loss"), history.per_epoch("images_per_second")
    rows = [
        [f"{epoch:.0f}", loss(mean), *(percent(values[row]) for values in scores.values()), f"{speed:,.0f}"]
        for row, (epoch, mean, speed) in enumerate(zip(*columns, strict=True))
    ]
    left_out = f'<p class="soft">The last {MOST_EPOCHS} of {len(rows):,}.</p>' * (len(rows) > MOST_EPOCHS)
    shown = table(["epoch", "loss", *scores, "images/s"], rows[-MOST_EPOCHS:])
    return f'<div class="card scroll">{left_out}{shown}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under their headings; the first cell of a row names it."""
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = ""
    for name, *cells in rows:
        body += f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
