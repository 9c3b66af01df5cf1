"""What TensorBoard shows of a run (--tensorboard): the records of metrics.jsonl as scalars, in an event file.

An event file holds protocol buffers in TFRecord's framing, both of which tensorboardX has. Its SummaryWriter is not
used: on a full disk its thread ends, and the run would wait for it for ever.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distconv.errors import StorageError, UsageError

SHARE = 0.01  # of the run's time that steps may cost here; where they are so quick, some are left out
SECONDS_BETWEEN_FLUSHES = 10.0  # epochs are on disk at once
SCORE = re.compile(r"((?:ema_)?(?:train|validation|test))_(\w+)")
TAGS = {
    "step": {
        "train_loss": "train/loss",
        "learning_rate": "learning_rate",
        "images_per_second": "images_per_second",
        "compute_seconds": "time/compute",
        "exchange_seconds": "time/exchange",
        "wait_seconds": "time/wait",
    },
    "epoch": {
        "train_loss": "train/epoch_loss",
        "wire_error": "wire/error",
        "flushed_share": "wire/flushed_share",
        "noise_scale": "noise_scale",
    },
}
NOT_SHOWN = ("step", "epoch", "wire_bytes", "wire_seconds_float32", "slowest_rank", "skipped")  # of a step


def require() -> None:
    """Raise UsageError where tensorboardX cannot be imported.

    It would import PyTorch, too, where that is installed: seconds and hundreds of MiB that nothing here uses.
    """
    without_torch = "torch" not in sys.modules
    if without_torch:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tensorboardX.proto.event_pb2
        import tensorboardX.summary  # noqa: F401
    except Exception as error:  # protobuf has its own, where it is of another version
        raise UsageError(
            f"--tensorboard needs tensorboardX, which cannot be imported ({textwrap.shorten(str(error), 200)}): pip "
            "install tensorboardX, or leave the flag out"
        ) from None
    finally:
        if without_torch:
            del sys.modules["torch"]


def scalars(event: str, fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The tags and values of a record. What a task sums besides its loss is batch/NAME, as its metric may have that."""
    tags = TAGS.get(event, {})
    for name, value in fields.items():
        score = SCORE.fullmatch(name)
        if name in tags:
            yield tags[name], value
        elif event == "step" and name not in NOT_SHOWN:
            yield f"batch/{name}", value
        elif event == "epoch" and score:
            yield f"{score[1]}/{score[2]}", value
        elif event == "final" and score:
            yield f"final/{name}", value


class EventFile:
    """Writes an event file of its own into the folder; TensorBoard shows all that are there as one run.

    step: after which the run goes on; what earlier files say of later steps is shown no more. settings: TOML, shown as
    text. Raises UsageError, StorageError, as do its methods.
    """

    def __init__(self, folder: Path, step: int, settings: str) -> None:
        require()
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import text

        self.Event, self.text = Event, text
        # Their order is that of their names.
        self.path = folder / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.began = self.flushed = time.perf_counter()
        self.spent = 0.0  # seconds, for steps
        try:
            folder.mkdir(exist_ok=True)
            self.file = RecordWriter(str(self.path.absolute()))
            self._append(Event(file_version="brain.Event:2"))
            self._append(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
            self._append(Event(step=step, summary=text("settings", textwrap.indent(settings, "    "))))
            self.file.flush()
        except OSError as error:
            raise self._failure(error) from None

    def write(self, event: str, fields: Mapping[str, Any]) -> None:
        """Show a record, numbers that are not finite as such; a step's only where it costs no more than SHARE."""
        began = time.perf_counter()
        if event == "step" and self.spent > SHARE * (began - self.began):
            return
        try:
            if event == "start":
                about = textwrap.indent(json.dumps(fields, indent=2), "    ")
                self._append(self.Event(step=fields["resumed_step"], summary=self.text("start", about)))
            elif found := list(scalars(event, fields)):
                message = self.Event(step=fields["step"])
                for tag, value in found:
                    message.summary.value.add(tag=tag, simple_value=value)
                self._append(message)
            if event != "step" or began - self.flushed > SECONDS_BETWEEN_FLUSHES:
                self.file.flush()
                self.flushed = began
        except OSError as error:
            raise self._failure(error) from None
        if event == "step":
            self.spent += time.perf_counter() - began

    def close(self) -> None:
        try:
            self.file.close()
        except OSError as error:
            raise self._failure(error) from None

    def _append(self, message: Any) -> None:
        message.wall_time = time.time()
        self.file.write(message.SerializeToString())

    def _failure(self, error: OSError) -> StorageError:
        return StorageError(f"{self.path} cannot be written: {error.strerror}")
