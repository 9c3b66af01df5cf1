"""What the tests of a run's folder share: runs that write to it, and looks into it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from distconv.config import Config
from distconv.run import folder
from distconv.run.log import read_metrics
from tests import jobs
from tests.test_failures import QUICK

# What rank 0 needs of a World, where nobody else is.
ALONE: Any = SimpleNamespace(on_rank_0=lambda find: find())


def run(out: Path, *more: str | Path, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    return jobs.run(ranks, "-m", "distconv.train", *QUICK, "--out", out, *more)


def look(out: Path, **changed: Any) -> Any:
    """What a run of these settings sees when it looks at its folder, before it starts."""
    quick = {"data": "digits", "limit_train": 150, "batch_size": 32, "eval_samples": 40, "epochs": 2}
    return folder.check_folder(Config(**{**quick, "out": str(out), **changed}), ALONE)


def everything(path: Path) -> dict[str, tuple[int, bytes]]:
    """What is in a folder: when each file was changed, and its content."""
    return {str(p): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in [path, *path.rglob("*")]}


def events(out: Path) -> list[str]:
    return [record["event"] for record in read_metrics(out / "metrics.jsonl")]


def put(path: Path) -> None:
    """A file that is not distconv's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '{"event": "start", "step": 3, "versions": {"another": 1}}\n[1]\n{"versions": 5, "event": "start"}\n'
    )
