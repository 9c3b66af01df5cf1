"""`--tensorboard`: what TensorBoard finds in the event files is what metrics.jsonl has, and each step once."""

from __future__ import annotations

import math
import re
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distconv.errors import CannotCreateError
from distconv.run import tensorboard
from distconv.run.folder import LOCK, find_checkpoints
from distconv.run.log import read_metrics
from distconv.run.tensorboard import EventFile
from tests import jobs
from tests.files import python
from tests.folders import look, run
from tests.test_failures import QUICK

pytest.importorskip("tensorboardX")
event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")

Shown = dict[str, dict[int, float]]


def crc32c(content: bytes) -> int:
    """Castagnoli's polynomial, bit by bit, lowest first."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(content: bytes) -> bytes:
    """As TFRecord has it: rotated to the right by 15 bits, plus a constant, little-endian."""
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def records(path: Path) -> Iterator[bytes]:
    """Of a TFRecord file: each its length in 8 bytes, their checksum, the content, its checksum."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        assert content[8:12] == masked(content[:8])
        record = content[12 : 12 + length]
        assert len(record) == length and content[12 + length : 16 + length] == masked(record)
        yield record
        content = content[16 + length :]


def events(folder: Path) -> list[Any]:
    return [event_pb2.Event.FromString(record) for path in sorted(folder.iterdir()) for record in records(path)]


def shown(folder: Path) -> tuple[Shown, dict[str, str]]:
    """The scalars by tag and step, and the texts, as TensorBoard takes them: a start hides what lies from its step on.

    No step may be there twice.
    """
    scalars: Shown = {}
    texts = {}
    for event in events(folder):
        if event.HasField("session_log"):
            assert event.session_log.status == event_pb2.SessionLog.START
            scalars = {tag: {s: v for s, v in curve.items() if s < event.step} for tag, curve in scalars.items()}
        for value in event.summary.value:
            if value.HasField("tensor"):
                texts[value.tag] = value.tensor.string_val[0].decode()
            else:
                curve = scalars.setdefault(value.tag, {})
                assert event.step not in curve
                curve[event.step] = value.simple_value
    return scalars, texts


def curve(metrics: list[Any], event: str, name: str) -> dict[int, float]:
    """A field of the records of an event by step, in the float32 that events have."""
    found = {record["step"]: record[name] for record in metrics if record["event"] == event}
    return {step: math.nan if value is None else float(np.float32(value)) for step, value in found.items()}


def assert_shows_its_metrics(out: Path) -> None:
    scalars, texts = shown(out / "tensorboard")
    metrics = read_metrics(out / "metrics.jsonl")
    of_steps = {
        "train/loss": "train_loss",
        "learning_rate": "learning_rate",
        "images_per_second": "images_per_second",
        "time/compute": "compute_seconds",
        "time/exchange": "exchange_seconds",
        "time/wait": "wait_seconds",
    }
    of_epochs = {
        "train/epoch_loss": "train_loss",
        "train/accuracy": "train_accuracy",
        "test/accuracy": "test_accuracy",
        "ema_test/accuracy": "ema_test_accuracy",
        "wire/error": "wire_error",
        "wire/flushed_share": "flushed_share",
        "noise_scale": "noise_scale",
    }
    of_the_end = {"final/test_accuracy": "test_accuracy", "final/ema_test_accuracy": "ema_test_accuracy"}
    assert set(scalars) == {*of_steps, *of_epochs, *of_the_end}
    for tag, name in of_steps.items():  # quick steps are not all shown
        assert 1 in scalars[tag] and scalars[tag].items() <= curve(metrics, "step", name).items()
    for event, names in (("epoch", of_epochs), ("final", of_the_end)):
        for tag, name in names.items():
            expected = curve(metrics, event, name)
            assert len(expected) > 0 and list(scalars[tag]) == list(expected)
            if name != "noise_scale":  # infinity is null in metrics.jsonl
                np.testing.assert_array_equal(list(scalars[tag].values()), list(expected.values()))
    assert "tensorboard = true" in texts["settings/text_summary"]
    assert '"parameter_count"' in texts["start/text_summary"]


def test_the_checksum_is_that_of_the_standard() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # its check value in catalogues of checksums


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tensorboard") / "out"
    flags = [*QUICK, "--tensorboard", "--ema", "0.9", "--ensemble", "2", "--out", out]
    result = jobs.run(2, "-m", "distconv.train", *flags)
    assert result.returncode == 0, result.stderr
    return out


@pytest.mark.parametrize("member", [0, 1])
def test_each_run_of_a_job_shows_its_own_metrics(ensemble: Path, member: int) -> None:
    assert_shows_its_metrics(ensemble / f"member-{member}")


def test_a_run_that_goes_on_shows_no_step_twice_and_has_not_changed(ensemble: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(ensemble / "member-1", out)
    find_checkpoints(out / "checkpoints")[0].unlink()  # that of the end, so the second epoch comes again
    result = run(out, "--tensorboard", "--ema", "0.9", "--seed", "1")
    assert result.returncode == 0 and "going on from" in result.stdout, result.stderr
    assert len(list((out / "tensorboard").iterdir())) == 2
    assert_shows_its_metrics(out)
    result = run(out, "--ema", "0.9", "--seed", "1", "--epochs", "3")
    assert result.returncode == 0 and re.findall("resumed with a change: (.*)", result.stdout) == [
        "epochs is now 3, was 2"
    ]
    assert len(list((out / "tensorboard").iterdir())) == 2


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "SHARE", math.inf)


@pytest.mark.usefixtures("every_step")
def test_a_users_own_metric_and_what_is_not_finite_are_shown(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "events", 0, "lr = 0.5\n")
    step = {"epoch": 1, "wire_bytes": 7, "wire_seconds_float32": 0.5, "slowest_rank": 0, "skipped": True}
    file.write("step", {"step": 1, "train_loss": math.nan, "artist_loss": 0.25, "iou": 0.125, **step})
    file.write("step", {"step": 2, "train_loss": -math.inf, "artist_loss": 1e300, "iou": 1e-300, **step})
    file.write("epoch", {"step": 2, "epoch": 1, "train_iou": 0.5, "ema_validation_iou": math.inf, "sha256": "a"})
    file.write("stop", {"step": 2})
    file.write("final", {"step": 2, "metric": "iou", "test_iou": 0.75, "correct": 3, "total": 4})
    file.close()
    expected = {
        "train/loss": {1: math.nan, 2: -math.inf},
        "batch/artist_loss": {1: 0.25, 2: math.inf},
        "batch/iou": {1: 0.125, 2: 0},
        "train/iou": {2: 0.5},
        "ema_validation/iou": {2: math.inf},
        "final/test_iou": {2: 0.75},
    }
    np.testing.assert_equal(shown(tmp_path / "events"), (expected, {"settings/text_summary": "    lr = 0.5\n"}))


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("step", [0, 3, 5])
def test_a_start_hides_what_lies_after_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    for now, first in ((1_000_000_000, 0), (1_000_000_001, step)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        file = EventFile(tmp_path / "events", first, "")
        for after in range(first + 1, 6):
            file.write("step", {"step": after, "train_loss": float(now + after)})
        file.close()
    found = shown(tmp_path / "events")[0]["train/loss"]
    assert found == {s: float(np.float32(1_000_000_000 + s + (s > step))) for s in range(1, 6)}


@pytest.mark.parametrize("step_seconds", [1.0, 0.004])
def test_steps_cost_a_hundredth_of_the_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_seconds: float
) -> None:
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now, time=lambda: 1e9 + clock.now)
    monkeypatch.setattr(tensorboard, "time", clock)
    file = EventFile(tmp_path / "events", 0, "")
    written = file._append

    def slowly(message: Any) -> None:
        clock.now += 0.001
        written(message)

    monkeypatch.setattr(file, "_append", slowly)
    for step in range(1, 1001):
        clock.now += step_seconds
        file.write("step", {"step": step, "train_loss": 0.5})
    file.close()
    steps = list(shown(tmp_path / "events")[0]["train/loss"])
    assert len(steps) * 0.001 <= 0.01 * clock.now + 0.001
    assert steps == list(range(1, 1001)) if step_seconds == 1 else len(steps) > 0.9 * 1000 * step_seconds * 0.01 / 0.001


def test_what_was_written_is_on_disk_before_the_end_of_the_run(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "events", 0, "")
    file.write("epoch", {"step": 2, "epoch": 1, "test_accuracy": 0.5})
    assert shown(tmp_path / "events")[0] == {"test/accuracy": {2: 0.5}}
    file.close()


@pytest.mark.parametrize("bytes_left", [10, 5000])
def test_a_full_disk_is_one_sentence(tmp_path: Path, bytes_left: int) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from distconv.run.tensorboard import EventFile, StorageError\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_left},) * 2)\n"
        "try:\n"
        "    file = EventFile(Path(sys.argv[1]), 0, '')\n"
        "    for n in range(1000): file.write('epoch', {'step': n, 'train_loss': 0.5})\n"
        "except StorageError as error: print(error)"
    )
    result = python("-c", script, tmp_path / "events")
    assert result.stderr == "" and re.fullmatch(r"\S*/events/\S* cannot be written: File too large\n", result.stdout)


def test_pytorch_is_not_imported_by_the_way_and_can_be_imported_afterwards(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("print('imported')")
    script = "import sys, distconv.run.tensorboard as t; t.require(); print('torch' in sys.modules); import torch"
    assert python("-c", script, PYTHONPATH=f"{tmp_path}:{':'.join(sys.path)}").stdout == "False\nimported\n"


@pytest.mark.parametrize("flags", [(), ("--ensemble", "2")])
def test_a_missing_library_is_told_once_before_anything_is_done(tmp_path: Path, flags: tuple[str, ...]) -> None:
    (tmp_path / "tensorboardX.py").write_text("raise ImportError('No module named tensorboardX')")
    command = ("-m", "distconv.train", *QUICK, "--tensorboard", *flags, "--out", tmp_path / "out")
    result = jobs.run(2, *command, PYTHONPATH=str(tmp_path))
    assert result.returncode == 2 and result.stdout == "" and not (tmp_path / "out").exists()
    (line,) = result.stderr.splitlines()
    assert "No module named tensorboardX" in line and "pip install tensorboardX" in line


def test_a_folder_of_somebodys_is_refused_only_where_it_would_be_written(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    with pytest.raises(CannotCreateError, match="holds tensorboard, which distconv did not make"):
        look(tmp_path, tensorboard=True)
    assert look(tmp_path) is None
    (tmp_path / LOCK).touch()  # of a run before
    assert look(tmp_path, tensorboard=True) is None
    (tmp_path / "tensorboard").rmdir()
    (tmp_path / "tensorboard").touch()
    with pytest.raises(CannotCreateError, match=r"tensorboard/.*: Not a directory"):
        look(tmp_path, tensorboard=True)
