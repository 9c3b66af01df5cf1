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

from distconv.run.report.advice import noise_scale
from distconv.run.report.charts import MOST_RANKS, SCORES
from distconv.run.report.history import History
from distconv.run.report.numbers import duration, in_bytes, milliseconds, percent, short

MOST_EPOCHS = 200  # rows of a table


def tiles(history: History) -> str:
    """Score, speed, and what they took."""
    parts = {part: history.median(f"{part}_seconds") for part in ("compute", "exchange", "wait")}
    speed, step, ranks = history.median("images_per_second"), sum(parts.values()), plural(history.ranks, "rank")
    final, peak = history.final or {}, (history.final or {}).get("peak_memory_bytes")
    whole = f"{final['correct']:,} of {final['total']:,}" if final.get("total") else "after the last epoch"
    entries = []
    if not math.isnan(history.score):
        entries.append((f"test {history.metric}", percent(history.score), whole))
    if step > 0:
        shares = ", ".join(f"{part} {seconds / step:.0%}" for part, seconds in parts.items())
        entries.append(("images/s", f"{speed:,.0f}", f"median, {ranks}"))
        entries.append(("a step of rank 0", milliseconds(1e3 * step), shares))
    planned = history.start.get("steps") or 0
    entries.append(("steps", f"{history.last_step:,}", f"of {planned:,}, {history.batch_size:,} images each"))
    if history.ranks > 1:
        sent = float(np.max(history.steps("wire_bytes"), initial=0))
        entries.append(("sent in a step", in_bytes(sent), f"by rank 0, {history.start.get('wire')}"))
    starts = plural(len(history.sessions), "start")
    entries.append(("time", duration(history.elapsed), f"goodput {history.goodput:.0%}, {starts}"))
    if (scale := noise_scale(history)) > 0:
        entries.append(("noise scale", short(scale), f"images, over the run; batch {history.batch_size:,}"))
    if memory := peak or history.start.get("memory_bytes"):
        entries.append(("memory of rank 0", in_bytes(memory), "peak" if peak else "expected"))
    shown = "".join(
        f'<div class="tile">{html.escape(name)}<b>{html.escape(value)}</b><small>{html.escape(note)}</small></div>'
        for name, value, note in entries
    )
    return f'<div class="tiles">{shown}</div>'


def sessions_table(history: History) -> str:
    """Each start, how far it came, and how much of the time was lost between."""
    rows, before = [], None
    for session in history.sessions:
        begun = float(session.start.get("time") or 0)
        lost = duration(begun - before) if before is not None else ""
        rows.append([
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begun)), str(session.start.get("ranks") or ""),
            f"{session.start.get('resumed_step') or 0:,} to {session.last_step:,}", duration(session.seconds), lost,
        ])  # fmt: skip
        before = begun + session.seconds
    head = ["started", "ranks", "steps that count", "time", "lost before it"]
    return f'<div class="card scroll">{table(head, rows)}</div>'


def facts(history: History) -> str:
    """What makes the run the same again."""
    start = history.start
    versions: Any = start.get("versions")
    hosts = Counter(map(str, start.get("hostnames") or []))
    images = f"{start.get('train_images') or 0:,} training and {start.get('test_images') or 0:,} test images"
    digest = next((r["parameters_sha256"] for r in reversed(history.records) if r.get("parameters_sha256")), "")
    entries: dict[str, Any] = {
        "command": history.command,
        "data": f"{start.get('data')}, {images}, SHA-256 {start.get('data_sha256')}",
        "model": f"{start.get('model')}, {start.get('parameter_count') or 0:,} parameters",
        "ranks": f"{history.ranks}, each on {start.get('device')} in {start.get('precision')}",
        "hosts": ", ".join(f"{host} ({plural(count, 'rank')})" for host, count in hosts.most_common(MOST_RANKS)),
        "exchange": f"{start.get('exchange')}, {start.get('wire')} on the wire",
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
        [f"{epoch:.0f}", f"{loss:.4f}", *(percent(values[row]) for values in scores.values()), f"{speed:,.0f}"]
        for row, (epoch, loss, speed) in enumerate(zip(*columns, strict=True))
    ]
    return f'<div class="card scroll">{table(["epoch", "loss", *scores, "images/s"], rows[-MOST_EPOCHS:])}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under their headings; the first cell of a row names it."""
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = ""
    for name, *cells in rows:
        body += f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
