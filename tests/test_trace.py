"""`--trace FILE`: a file that Perfetto reads, of a run that it does not change. On which exchanges: tests/parallel."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distconv.comm.clocks import Reading
from distconv.errors import CannotCreateError
from distconv.run.log import read_metrics
from distconv.run.spans import BUCKETS, MAIN
from distconv.run.trace_file import OfRank, check_trace, joined, write_trace
from tests import jobs
from tests.test_box import BOX, needs_a_box
from tests.traces import Trace, check_barriers, check_form, named, read

QUICK = ("--data", "digits", "--limit-train", "200", "--batch-size", "20", "--eval-samples", "40")  # 10 steps an epoch
LAYERS = [f"conv{i}" for i in range(1, 7)] + ["affine1", "dropout1", "affine2", "dropout2"]


def train(ranks: int, *arguments: str | Path, **environment: str) -> Any:
    return jobs.run(ranks, "-m", "distconv.train", *QUICK, *arguments, **environment)


def sha(out: Path) -> object:
    return read_metrics(out / "metrics.jsonl")[-1]["parameters_sha256"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run twice, on two ranks: `plain`, and `seen` with its trace in trace.json."""
    folder = tmp_path_factory.mktemp("trace")
    assert train(2, "--epochs", "1", "--out", folder / "plain").returncode == 0
    result = train(2, "--epochs", "1", "--out", folder / "seen", "--trace", folder / "seen" / "trace.json")
    assert result.returncode == 0, result.stderr
    (folder / "stdout").write_text(result.stdout)
    return folder


@pytest.fixture(scope="module")
def trace(both: Path) -> Trace:
    return read(both / "seen" / "trace.json")


def test_a_run_with_a_trace_has_the_bits_of_one_without(both: Path) -> None:
    assert sha(both / "plain") == sha(both / "seen")
    plain, seen = (
        [record["train_loss"] for record in read_metrics(both / out / "metrics.jsonl") if record["event"] == "step"]
        for out in ("plain", "seen")
    )
    assert len(plain) == 10 and plain == seen


def test_one_line_tells_where_the_trace_is_and_how_to_open_it(both: Path) -> None:
    (line,) = [line for line in (both / "stdout").read_text().splitlines() if "trace.json" in line]
    assert "steps 4 to 8" in line and str(both / "seen" / "trace.json") in line and "ui.perfetto.dev" in line


def test_every_rank_shows_every_layer_and_part_of_each_step(trace: Trace) -> None:
    check_form(trace, ranks=2)
    assert trace["otherData"]["steps"] == [4, 5, 6, 7, 8]
    expected = {f"{name} {way}" for name in (*LAYERS, "model") for way in ("forward", "backward")}
    expected |= {
        "compute",
        "batch",
        "loss",
        "exchange",
        "encode",
        "scatter",
        "wait",
        "sum",
        "gather",
        "decode",
        "update",
    }
    for rank in range(2):
        steps = [event for event in named(trace, rank) if event["name"].startswith("step ")]
        assert [event["name"] for event in steps] == [f"step {step}" for step in range(4, 9)]
        for step in steps:
            until = step["ts"] + step["dur"]
            inside = [event for event in named(trace, rank) if step["ts"] <= event["ts"] < until]
            assert {event["name"] for event in inside} >= expected
            for wholes, parts in (
                ([step], ("compute", "exchange", "update", "checksum")),
                (
                    [event for event in inside if event["name"] == "compute"],
                    ("batch", "model forward", "loss", "model backward"),
                ),
                (
                    [event for event in inside if event["name"] == "model forward"],
                    [f"{name} forward" for name in LAYERS],
                ),
            ):
                spent = sum(event["dur"] for event in inside if event["name"] in parts)
                assert 0 < spent <= sum(whole["dur"] for whole in wholes) + 0.01


def test_what_is_rare_is_shown_of_the_whole_run(trace: Trace) -> None:
    for rank in range(2):
        count = {name: len(named(trace, rank, name)) for name in ("evaluate", "agree", "end of epoch", "save")}
        assert count["evaluate"] == 3 and count["end of epoch"] == 1 and count["agree"] >= 2
        assert (count["save"] > 0) == (rank == 0)
        (end,) = named(trace, rank, "end of epoch")
        assert end["ts"] > named(trace, rank, "step 8")[0]["ts"]
    assert trace["otherData"]["spans_left_out"] == {}


def test_no_rank_leaves_a_barrier_before_the_last_has_come(trace: Trace) -> None:
    assert check_barriers(trace, ranks=2, names=("scatter", "gather")) == 10


@pytest.mark.slow
@needs_a_box
def test_clocks_of_hosts_are_brought_together(tmp_path: Path) -> None:
    """These hosts have the same clock, so the true offset is 0; no estimate may be further off than it says."""
    file = tmp_path / "trace.json"
    command = [jobs.MPIRUN, "-n", "2", sys.executable, "-m", "distconv.train", *QUICK, "--epochs", "1"]
    result = jobs.run(None, sys.executable, BOX, "--", *command, "--out", tmp_path / "run", "--trace", file)
    assert result.returncode == 0, result.stdout + result.stderr
    trace = read(file)
    check_form(trace, ranks=2)
    first, second = trace["otherData"]["clocks"]
    assert (first["host"], second["host"], second["first_rank"]) == ("h0", "h1", 1)
    assert len(second["offset_us"]) == 3  # at the start, after the steps, at the end
    for offset, round_trip in zip(second["offset_us"], second["round_trip_us"], strict=True):
        assert abs(offset) <= round_trip / 2 and round_trip > 0
    error = max(second["round_trip_us"]) / 2
    assert check_barriers(trace, ranks=2, names=("scatter", "gather"), error=error) == 10
    assert "messages" in trace["otherData"]["exchange"]


def test_a_run_goes_on_with_another_trace(both: Path, tmp_path: Path) -> None:
    """What is shown, and where, makes no other run; the trace that is there is written over."""
    shutil.copytree(both / "seen", tmp_path / "run")
    file = tmp_path / "run" / "trace.json"
    result = train(1, "--epochs", "2", "--out", tmp_path / "run", "--trace", file, "--trace-steps", "2")
    assert result.returncode == 0, result.stderr
    assert "resumed with a change: epochs is now 2" in result.stdout
    assert "trace is now" not in result.stdout and "trace_steps is now" not in result.stdout
    trace = read(file)
    check_form(trace, ranks=1)
    assert trace["otherData"]["steps"] == [14, 15]


def test_each_run_of_an_ensemble_has_its_own_trace_and_two_steps_are_enough(tmp_path: Path) -> None:
    short = ("--limit-train", "40", "--epochs", "1", "--model", "simpleconvnet", "--ensemble", "2")
    assert train(2, *short, "--out", tmp_path / "out", "--trace", tmp_path / "new" / "trace.json").returncode == 0
    files = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in files] == ["trace-member-0.json", "trace-member-1.json"]
    for path in files:
        trace = read(path)
        check_form(trace, ranks=1)
        assert trace["otherData"]["steps"] == [1, 2] and len(named(trace, 0, "conv1 backward")) == 2


def test_a_path_that_cannot_be_written_is_refused_before_anything_takes_long(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("somebody's")
    result = train(2, "--out", tmp_path / "run", "--trace", tmp_path / "file" / "trace.json")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 73 and str(tmp_path / "file") in line and "cannot be written" in line
    assert not (tmp_path / "run").exists()


def test_what_is_there_is_kept_but_for_a_trace(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("somebody's")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(CannotCreateError, match="is no trace"):
            check_trace(path, None)
    file = tmp_path / "a" / "trace.json"
    check_trace(file, file.parent)
    assert not file.parent.exists()
    write_trace(file, [OfRank("h", 0, [], 0)], [{0: Reading(0, 0, 0)}], {})
    check_trace(file, file.parent)
    assert json.loads(file.read_text())["traceEvents"][0]["args"] == {"name": "rank 0 on h"}


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "report.html", "errors/rank-0.json", "checkpoints/a.json", "tensorboard/a.json", ".", ".."],
)
def test_no_file_of_the_run_itself_becomes_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("runs/mine")
    for path in (out / name, tmp_path / out / name):
        with pytest.raises(CannotCreateError, match="has its own"):
            check_trace(path, out)
    with pytest.raises(CannotCreateError, match="has its own"):
        check_trace(out, out)
    assert not (tmp_path / "runs").exists()


def test_a_hosts_clock_that_is_off_and_drifts_is_put_right(tmp_path: Path) -> None:
    """Rank 1's clock is 5 ms ahead at first, and gains 1 ms in 100; both ranks do the same at the same time."""
    true = np.array([10e6, 10.5e6, 60e6, 109e6], np.int64)
    skewed = np.rint(true + 5e6 + true / 100).astype(np.int64)
    spans = [[("a", "", *map(int, t[:2]), MAIN), ("b", "", *map(int, t[2:]), MAIN)] for t in (true, skewed)]
    at = [
        {0: Reading(t, 0, 0), 1: Reading(round(t * 1.01 + 5e6), round(t / 100 + 5e6), 40_000)} for t in (0, 110_000_000)
    ]
    write_trace(tmp_path / "t", [OfRank(f"h{r}", r, spans[r], r) for r in range(2)], at, {"model": "m"})
    trace = read(tmp_path / "t")
    check_form(trace, ranks=2)
    for name, begin, length in (("a", 0.0, 500.0), ("b", 50_000.0, 49_000.0)):
        for rank in range(2):
            (event,) = named(trace, rank, name)
            assert event["ts"] == pytest.approx(begin, abs=0.01) and event["dur"] == pytest.approx(length, abs=0.01)
    others = trace["otherData"]
    assert others["clocks"][1] == {
        "host": "h1",
        "first_rank": 1,
        "offset_us": [5000.0, 6100.0],
        "round_trip_us": [40.0] * 2,
    }
    assert others["spans_left_out"] == {"rank 1": 1} and others["model"] == "m"


def test_encoding_for_each_rank_is_one_span() -> None:
    spans = [
        ("encode", "", 1, 2, MAIN),
        ("encode", "", 5, 6, BUCKETS),
        ("encode", "", 3, 4, MAIN),
        ("sum", "", 5, 6, MAIN),
        ("sum", "", 6, 7, MAIN),
        ("encode", "", 8, 9, MAIN),
    ]
    assert joined(spans) == [("encode", "", 1, 4, MAIN), spans[1], *spans[3:]]
