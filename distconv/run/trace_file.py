"""The file that --trace names: spans of all ranks in Chrome's trace event format, which Perfetto and Chrome show.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. A process (pid) is a rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.comm.clocks import Reading
from distconv.errors import CannotCreateError, StorageError
from distconv.run.files import write_text
from distconv.run.folder import EVENTS, LOCK, REWRITTEN, try_to_write
from distconv.run.spans import BUCKETS, DEVICE, MAIN, Span

BEGINNING = '{"traceEvents": ['  # by which a file is known as ours
TIMELINES = {MAIN: "main", BUCKETS: "exchange of buckets", DEVICE: "GPU"}
CALLED_OFTEN = ("encode", "decode")  # once for each rank, one after the other
MICROSECOND = 1000  # nanoseconds


@dataclass(frozen=True)
class OfRank:
    """What a rank gives. clock: the first rank of its host; spans: in nanoseconds of that clock."""

    host: str
    clock: int
    spans: Sequence[Span]
    left_out: int


def check_trace(path: Path, out: Path | None) -> None:
    """Raise CannotCreateError for what cannot be written, or is there and is no trace; nothing is changed.

    out: the folder of the run, if it is named, whose own files the trace must not take the place of.
    """
    try:
        if out is not None and _is_the_runs(Path(os.path.realpath(path)), Path(os.path.realpath(out))):
            raise CannotCreateError(f"--trace {path} is where the run in --out {out} has its own: give another name")
        if path.exists() and not _is_ours(path):
            raise CannotCreateError(
                f"--trace {path} is there already, is no trace, and would be written over: give another name"
            )
        try_to_write(path.parent)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CannotCreateError(f"--trace {str(path)!r} cannot be written ({why}): give a file that can be") from None


def _is_the_runs(path: Path, out: Path) -> bool:
    """Whether a run has a folder there, or will have a file."""
    own = [out / name for name in (*REWRITTEN, LOCK, EVENTS, "checkpoints")]
    return path in (out, *out.parents) or any(file in (path, *path.parents) for file in own)


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(BEGINNING)) == BEGINNING.encode()


def write_trace(
    path: Path, ranks: Sequence[OfRank], readings: Sequence[Mapping[int, Reading]], about: Mapping[str, Any]
) -> None:
    """Write the file, whole or not at all. readings: of the clocks, in their order. Raises StorageError."""
    spans = [_on_one_clock(one, [reading[one.clock] for reading in readings]) for one in ranks]
    start = min((int(times.min()) for times in spans if times.size), default=0)
    events: list[dict[str, Any]] = []
    for rank, (one, times) in enumerate(zip(ranks, spans, strict=True)):
        events += _titles(rank, one)
        events += _events(rank, one.spans, times - start)
    clocks = [
        {
            "host": ranks[first].host,
            "first_rank": first,
            "offset_us": [reading[first].offset / MICROSECOND for reading in readings],
            "round_trip_us": [reading[first].round_trip / MICROSECOND for reading in readings],
        }
        for first in readings[0]
    ]
    left_out = {f"rank {rank}": one.left_out for rank, one in enumerate(ranks) if one.left_out}
    others = {**about, "clocks": clocks, "spans_left_out": left_out}
    text = ",\n".join(json.dumps(event) for event in events)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path.parent} cannot be made: {error}") from None
    write_text(path, f'{BEGINNING}\n{text}\n],\n"displayTimeUnit": "ms",\n"otherData": {json.dumps(others)}}}\n')


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same, where calls that an exchange makes once for each rank, one after the other, are one span."""
    found: list[Span] = []
    last: dict[int, int] = {}  # where in found the last span of a timeline is
    for name, way, begin, end, timeline in spans:
        if name in CALLED_OFTEN and timeline in last and found[last[timeline]][0] == name:
            found[last[timeline]] = (name, way, found[last[timeline]][2], end, timeline)
        else:
            last[timeline] = len(found)
            found.append((name, way, begin, end, timeline))
    return found


def _on_one_clock(one: OfRank, readings: Sequence[Reading]) -> NDArray[np.int64]:
    """Begins and ends (N, 2) in nanoseconds of rank 0's clock. Between two readings, clocks drift apart evenly."""
    times = np.array([(begin, end) for _, _, begin, end, _ in one.spans], np.int64).reshape(-1, 2)
    offsets = np.interp(times, [reading.at for reading in readings], [reading.offset for reading in readings])
    return times - np.rint(offsets).astype(np.int64)


def _titles(rank: int, one: OfRank) -> list[dict[str, Any]]:
    def title(kind: str, timeline: int, **about: Any) -> dict[str, Any]:
        return {"name": kind, "ph": "M", "pid": rank, "tid": timeline, "args": about}

    used = sorted({MAIN, *(timeline for *_, timeline in one.spans)})
    return [
        title("process_name", MAIN, name=f"rank {rank} on {one.host}"),
        title("process_sort_index", MAIN, sort_index=rank),
        *(title("thread_name", timeline, name=TIMELINES[timeline]) for timeline in used),
        *(title("thread_sort_index", timeline, sort_index=timeline) for timeline in used),
    ]


def _events(rank: int, spans: Sequence[Span], times: NDArray[np.int64]) -> list[dict[str, Any]]:
    """In the order of their begins, what encloses others before them."""
    order = np.lexsort((-times[:, 1], times[:, 0]))
    return [
        {
            "name": f"{spans[i][0]} {spans[i][1]}".rstrip(),
            "cat": spans[i][1] or "run",
            "ph": "X",
            "ts": int(times[i, 0]) / MICROSECOND,
            "dur": int(times[i, 1] - times[i, 0]) / MICROSECOND,
            "pid": rank,
            "tid": spans[i][4],
        }
        for i in order
    ]
