"""The records of runs as a table for a spreadsheet or pandas."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from distconv.run.files import as_bytes, write_whole
from distconv.run.report.history import History

EVENTS = ("step", "epoch", "final")
FIRST = ("run", "event", "step", "epoch", "time")


def write_csv(path: Path, histories: Sequence[History]) -> None:
    """Write a row for each step, epoch and end, a column for each key; a cell is empty where a record has no such key.

    Of a list, as of a number for each rank, the parts stand apart by spaces. Raises StorageError.
    """
    rows = [
        {"run": str(history.folder), **record}
        for history in histories
        for record in history.records
        if record.get("event") in EVENTS
    ]
    columns = [*FIRST, *sorted({key for row in rows for key in row} - set(FIRST))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({
            key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()
        })  # fmt: skip
    write_whole(path, as_bytes(text.getvalue()))
