"""What holds of any file of --trace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Trace = Mapping[str, Any]
ROUNDING = 0.002  # microseconds


def read(path: Path) -> Trace:
    found: Trace = json.loads(path.read_text())
    return found


def named(trace: Trace, rank: int, name: str = "", timeline: int | None = None) -> list[Mapping[str, Any]]:
    """The spans of a rank, in the order of their begins."""
    return [
        event
        for event in trace["traceEvents"]
        if event["ph"] == "X" and event["pid"] == rank and name in ("", event["name"])
        if timeline in (None, event["tid"])
    ]


def check_form(trace: Trace, ranks: int) -> None:
    """Each event is what the format asks for, each rank and timeline has a name, and spans of a timeline nest."""
    assert {"traceEvents", "displayTimeUnit", "otherData"} == set(trace)
    titles = {}
    for event in trace["traceEvents"]:
        assert event["ph"] in ("X", "M") and event["pid"] in range(ranks) and event["tid"] in range(3), event
        if event["ph"] == "M":
            titles[event["name"], event["pid"], event["tid"]] = next(iter(event["args"].values()))
        else:
            assert isinstance(event["name"], str) and event["name"]
            assert all(isinstance(event[key], int | float) and event[key] >= 0 for key in ("ts", "dur"))
    for rank in range(ranks):
        assert titles["process_name", rank, 0].startswith(f"rank {rank} on ")
        assert titles["process_sort_index", rank, 0] == rank
        for timeline in {event["tid"] for event in named(trace, rank)}:
            assert titles["thread_name", rank, timeline]
            check_nesting(named(trace, rank, timeline=timeline))


def check_nesting(events: Sequence[Mapping[str, Any]]) -> None:
    around: list[Mapping[str, Any]] = []
    for before, event in zip([None, *events], events, strict=False):
        assert before is None or before["ts"] <= event["ts"]
        while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"] + ROUNDING:
            around.pop()
        if around:
            outer = around[-1]
            assert event["ts"] + event["dur"] <= outer["ts"] + outer["dur"] + ROUNDING, (outer, event)
        around.append(event)


def check_barriers(trace: Trace, ranks: int, names: Sequence[str], error: float = 0.0) -> int:
    """Nobody leaves one of these before all have come, but for the clocks' error (us). Returns how many there were."""
    found = 0
    for name in names:
        for calls in zip(*(named(trace, rank, name) for rank in range(ranks)), strict=True):
            last_came = max(call["ts"] for call in calls)
            first_left = min(call["ts"] + call["dur"] for call in calls)
            assert first_left >= last_came - error - ROUNDING, (name, calls)
            found += 1
    return found
