"""What a run tells: a file that survives kills and restarts, and lines that a person can live with."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from distconv.config import Config
from distconv.errors import StorageError
from distconv.run import log as runlog
from distconv.run.ending import conclude
from distconv.run.files import write_text, write_whole
from distconv.run.log import RunLog, describe_steps, read_metrics
from tests import jobs
from tests.files import ROOT

RECORDS = [
    {"event": "start", "resumed_step": 0},
    *({"event": "step", "step": step, "train_loss": 1 / step} for step in (1, 2, 3)),
    {"event": "epoch", "step": 3, "epoch": 1},
    *({"event": "step", "step": step, "train_loss": 1 / step} for step in (4, 5, 6)),
    {"event": "epoch", "step": 6, "epoch": 2},
    {"event": "final", "step": 6, "test_accuracy": 0.5},
]


def written(path: Path) -> list[dict]:
    """The records of a file without their times."""
    return [{key: value for key, value in record.items() if key != "time"} for record in read_metrics(path)]


def lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(RECORDS))
    return path


def test_what_is_written_is_on_disk_at_once_one_object_a_line(tmp_path: Path) -> None:
    path, log = tmp_path / "metrics.jsonl", RunLog(True)
    log.open(path, 0)
    log.write("step", step=1, train_loss=0.5, text='odd "text"\nin two lines')
    expected = {"event": "step", "step": 1, "train_loss": 0.5, "text": 'odd "text"\nin two lines'}
    (line,) = path.read_text().splitlines()  # before close: a kill loses nothing
    log.close()
    assert written(path) == [expected] and json.loads(line) == read_metrics(path)[0]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path, log = tmp_path / "metrics.jsonl", RunLog(True)
    log.open(path, 0)
    log.write("step", a=math.nan, b=math.inf, c=-math.inf, d=0.0, e=1e308)
    log.close()
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert math.isfinite(strict.pop("time"))
    assert strict == {"event": "step", "a": None, "b": None, "c": None, "d": 0.0, "e": 1e308}


@pytest.mark.parametrize("step", [0, 2, 3, 6])
def test_a_resumed_run_forgets_what_lies_after_its_step_and_its_end(path: Path, step: int) -> None:
    log = RunLog(True)
    log.open(path, step)
    log.write("start", resumed_step=step)
    log.close()
    kept = [record for record in RECORDS if record["event"] != "final" and record.get("step", 0) <= step]
    assert written(path) == [*kept, {"event": "start", "resumed_step": step}]
    assert [name.name for name in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("length", [1, 20, len(lines(RECORDS[4:5])) - 1])
def test_a_torn_last_line_is_passed_over_and_not_written_on(path: Path, length: int) -> None:
    path.write_text(lines(RECORDS[:4]) + lines(RECORDS[4:5])[:length].rstrip("}"))
    assert read_metrics(path) == RECORDS[:4]
    log = RunLog(True)
    log.open(path, 3)
    log.write("epoch", step=3, epoch=1)
    log.close()
    assert written(path) == RECORDS[:5] and len(path.read_text().splitlines()) == 5


def test_a_file_that_may_not_be_read_is_told_in_a_sentence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("")
    monkeypatch.setattr(Path, "read_text", mock.Mock(side_effect=PermissionError(13, "Permission denied")))  # root may
    with pytest.raises(StorageError, match=f"{path} cannot be read: Permission denied"):
        read_metrics(path)


@pytest.mark.parametrize("damage", [b"\0\0\0\0\n", b"\n", b"[1, 2]\n", b"\xff\xfe\x80\n"])
def test_a_damaged_line_costs_only_itself(path: Path, damage: bytes) -> None:
    start, end = lines(RECORDS[:3]).encode(), lines(RECORDS[3:]).encode()
    path.write_bytes(start + damage + end)
    assert read_metrics(path) == RECORDS


@pytest.mark.parametrize(
    "odd",
    [
        "[" * 100_000,
        '{"event": "step", "step": null}',
        '{"event": "start", "time": null}',
        '{"event": "final", "correct": "9"}',
    ],
)
def test_a_record_of_another_shape_costs_only_itself(path: Path, odd: str) -> None:
    before = read_metrics(path)
    with path.open("a") as file:
        file.write(odd + "\n")
    assert read_metrics(path) == before


def test_records_without_their_fields_are_described() -> None:
    steps = [{"event": "step"}, {"event": "step", "compute_seconds": None}]
    assert "0.00 ms compute" in describe_steps(steps, 2)


class FullDisk(io.StringIO):
    name = "metrics.jsonl"

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_while_writing_is_a_storage_error_with_its_name() -> None:
    log = RunLog(True)
    log.file = FullDisk()
    with pytest.raises(StorageError, match=r"metrics\.jsonl.*No space left"):
        log.write("step", step=1)


def test_a_silent_rank_says_and_writes_nothing(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(False)
    log.open(path, 0)
    log.write("step", step=1)
    log.say("something")
    log.say_aside("something")
    log.last_line = -math.inf
    log.progress(1, 2, 1, 1, 0.5, 100.0)
    log.evaluating("float32", 1, 2)
    log.close()
    assert capsys.readouterr() == ("", "")
    assert path.read_text() == lines(RECORDS)


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=1000.0)
    monkeypatch.setattr(runlog, "time", clock)
    monkeypatch.setattr(runlog, "on_a_terminal", lambda: False)
    log = RunLog(True)
    for step in range(1, 1001):  # a hundred seconds
        clock.now += 0.1
        log.progress(step, 12_000, 3, 20, 0.25, 999.6)
    out, err = capsys.readouterr()
    printed = out.splitlines()
    assert err == "" and 9 <= len(printed) <= 10
    assert printed[-1].startswith("epoch 3/20, step ") and printed[-1].endswith("of 12,000: loss 0.250, 1,000 images/s")
    clock.now += 60
    log.progress(1000, 12_000, 3, 20, 3e31, 999.6)
    assert capsys.readouterr().out.endswith("loss 3e+31, 1,000 images/s\n")
    clock.now += 60  # a slow step is not made up for by many lines
    for step in (1001, 1002, 1003):
        log.progress(step, 12_000, 3, 20, 0.25, 999.6)
    assert capsys.readouterr().out.count("\n") == 1


def test_on_a_terminal_progress_is_a_bar_that_starts_where_the_run_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runlog, "on_a_terminal", lambda: True)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # no thread of its own
    log = RunLog(True)
    for step in (501, 502, 503):
        log.progress(step, 1000, 2, 4, 0.5, 100.0)
    assert (log.bar.initial, log.bar.n, log.bar.total) == (500, 503, 1000)
    log.say("a line beside it")
    log.close()
    out, err = capsys.readouterr()
    assert out == "a line beside it\n" and "epoch 2/4" in err


@pytest.mark.parametrize("terminal", [False, True])
def test_an_evaluation_shows_how_far_it_is_beside_its_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=1000.0)
    monkeypatch.setattr(runlog, "time", clock)
    monkeypatch.setattr(runlog, "on_a_terminal", lambda: terminal)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # no thread of its own
    log = RunLog(True)
    for precision in ("float32", "float64"):
        for done in range(100, 10_001, 100):  # a minute
            clock.now += 0.6
            log.evaluating(precision, done, 10_000)
        assert log.bar is None  # nothing of a bar is left when its row is printed
        log.say(precision)
    out, err = capsys.readouterr()
    assert out == "float32\nfloat64\n"
    if terminal:
        assert "float64:" in err and "/10000" in err
    else:
        assert 10 <= err.count("\n") <= 12
        assert err.splitlines()[-1].startswith("distconv: float64: 8,") and err.endswith(" of 10,000 images\n")


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    code = (
        "import sys; from distconv.run.log import RunLog; log = RunLog(True); sys.stdin.readline()\n"
        "for _ in range(3): log.say('still here')\n"
        "print('done', file=sys.stderr)"
    )
    arguments = [sys.executable, "-c", code]
    with subprocess.Popen(
        arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()  # as `head` does, before the first line
        process.stdout = None
        _, err = process.communicate("\n", timeout=60)
    assert (process.returncode, err) == (0, "done\n")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "config.toml", "lr = 1.0\n")
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (5, 5)); from pathlib import Path; "
    write = "from distconv.run.files import write_text; write_text(Path(sys.argv[1]), 'lr = 2.0, which is too long')"
    assert jobs.run(0, "-c", limit + write, tmp_path / "config.toml").returncode == 1
    assert (tmp_path / "config.toml").read_text() == "lr = 1.0\n"


@pytest.mark.parametrize(
    ("score", "target", "code"),
    [(-1.4, 0.0, 0), (-1.4, 0.9, 1), (math.nan, 0.0, 0), (math.nan, 0.9, 1), (0.9, 0.9, 0), (0.89, 0.9, 1)],
)
def test_a_target_is_missed_only_where_there_is_one(tmp_path: Path, score: float, target: float, code: int) -> None:
    final = {"metric": "reward", "test_reward": score, "correct": 1, "total": 1}
    assert conclude(final, Config(target_accuracy=target), tmp_path, RunLog(False)) == code


@pytest.mark.parametrize("writer", ["", ".77"])
def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, writer: str) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(StorageError, match=r"page\.html cannot be written: Is a directory$"):
        write_whole(tmp_path / "page.html", b"content", writer)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
