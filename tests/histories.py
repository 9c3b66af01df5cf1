"""Records of runs that never were, for the tests of reports."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

START = {
    "ranks": 2, "hosts": 1, "hostnames": ["one", "two"], "device": "cpu", "precision": "float32", "wire": "float16",
    "exchange": "flat", "model": "deepconvnet", "parameter_count": 10, "data": "digits", "data_sha256": "abc",
    "memory_bytes": 1 << 28, "train_images": 1000, "test_images": 500, "batch_size": 100, "steps": 20,
    "versions": {"distconv": "0.1.0"},
}  # fmt: skip


FINAL = {"event": "final", "time": 9.0, "step": 20}


def start(time: float = 0.0, **changed: Any) -> dict[str, Any]:
    return {"event": "start", "time": time, "resumed_step": 0, **START, **changed}


def step(number: int, time: float = 0.0, **changed: Any) -> dict[str, Any]:
    return {
        "event": "step", "time": time or number, "step": number, "epoch": 1, "train_loss": 2.0, "learning_rate": 0.001,
        "images_per_second": 1000.0, "compute_seconds": 0.08, "exchange_seconds": 0.01, "wait_seconds": 0.01,
        "wire_bytes": 1000, "wire_seconds_float32": 0.02, "slowest_rank": 1, "skipped": False, **changed,
    }  # fmt: skip


def epoch(number: int, test: float, train: float, **changed: Any) -> dict[str, Any]:
    scores = {"train_accuracy": train, "test_accuracy": test, "train_loss": 1.0}
    return {"event": "epoch", "time": 100.0, "step": 10 * number, "epoch": number, **scores, **changed}


def write(folder: Path, *records: dict[str, Any], config: str = "epochs = 2\n") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.toml").write_text(config)
    return folder


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", page))
