"""What a run tells: metrics.jsonl for programs, lines and a progress bar for people. Only rank 0 has a voice."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm

from distconv.errors import StorageError
from distconv.formatting import loss as short_loss
from distconv.process.launched import PROCESSES, parents
from distconv.process.streams import lead_nowhere
from distconv.run.files import write_text
from distconv.run.noise import advice, over_a_run

if TYPE_CHECKING:
    from distconv.run.tensorboard import EventFile

# Fields of the records that curves, lines and finished runs are made of; besides them losses and scores, see PARTS.
READ_AGAIN = (
    "epoch",
    "learning_rate",
    "images_per_second",
    "noise_scale",
    "noise_scale_error",
    "compute_seconds",
    "exchange_seconds",
    "wait_seconds",
    "wire_bytes",
    "wire_seconds_float32",
    "slowest_rank",
    "correct",
    "total",
)
PARTS = ("train_", "validation_", "test_", "ema_")  # what the names of a loss and of scores begin with
OF_A_STEP = (  # fields of a start, on which it hangs how long a step takes and what it sends
    "ranks", "hosts", "device", "precision", "exchange", "wire",
)  # fmt: skip
SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal


class RunLog:
    """The voice of a run. On a silent rank every method does nothing.

    prefix: what each line begins with, where several runs speak; then there is no bar.
    """

    def __init__(self, speaks: bool, prefix: str = "") -> None:
        self.speaks, self.prefix = speaks, prefix
        self.file: IO[str] | None = None
        self.events: EventFile | None = None  # has the records, too
        self.bar: Any = None
        self.draws = speaks and not prefix and on_a_terminal()
        self.last_line = time.monotonic()

    def say(self, text: str) -> None:
        """One line on standard output, above the progress bar if there is one."""
        if self.speaks:
            try:
                with tqdm.external_write_mode(file=sys.stdout):
                    print(self.prefix + text, flush=True)
            except BrokenPipeError:  # nobody listens any more, but the run goes on
                lead_nowhere(sys.stdout.fileno())
            except OSError as error:
                raise StorageError(f"standard output cannot be written: {error.strerror}") from None

    def say_aside(self, text: str) -> None:
        """One line on standard error, for a command whose standard output is its result."""
        if self.speaks:
            print(f"distconv: {text}", file=sys.stderr, flush=True)

    def open(self, path: Path, step: int) -> None:
        """Append to a file of metrics, without what lies after a step: that is about to happen again.

        Raises StorageError.
        """
        if not self.speaks:
            return
        kept = [record for record in read_metrics(path) if _happened(record, step)]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        try:
            self.file = path.open("a")
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error}") from None

    def write(self, event: str, **fields: Any) -> None:
        """One line of metrics, with the time of day (seconds since 1970). Raises StorageError.

        Numbers that are not finite become null, as JSON has none.
        """
        if self.file is None:
            return
        if self.events is not None:
            self.events.write(event, fields)
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        try:
            self.file.write(json.dumps({"event": event, "time": round(time.time(), 3), **clean}) + "\n")
            self.file.flush()
        except OSError as error:
            raise StorageError(f"{self.file.name} cannot be written: {error}") from None

    def progress(self, step: int, steps: int, epoch: int, epochs: int, loss: float, images_per_second: float) -> None:
        """Show how far the run is: a bar on a terminal, else a line about every ten seconds."""
        if not self.speaks:
            return
        if self.bar is None and self.draws:
            self.bar = tqdm(total=steps, initial=step - 1, unit="step", dynamic_ncols=True, leave=False)
        if self.bar is not None:
            self.bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
            self.bar.set_postfix_str(f"loss {short_loss(loss, 3)}, {images_per_second:,.0f} images/s", refresh=False)
            self.bar.update(step - self.bar.n)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            self.say(
                f"epoch {epoch}/{epochs}, step {step:,} of {steps:,}: loss {short_loss(loss, 3)}, "
                f"{images_per_second:,.0f} images/s"
            )

    def evaluating(self, what: str, done: int, total: int) -> None:
        """Show how far an evaluation is, on standard error: by a bar on a terminal, else a line every ten seconds."""
        if not self.speaks:
            return
        if self.draws:
            self.bar = self.bar or tqdm(total=total, desc=what, unit="image", dynamic_ncols=True, leave=False)
            self.bar.update(done - self.bar.n)
            if done == total:
                self.bar.close()
                self.bar = None
        elif done < total and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            self.say_aside(f"{what}: {done:,} of {total:,} images")

    def close(self) -> None:
        """Take the bar away and close the files. Raises StorageError."""
        if self.bar is not None:
            self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.events is not None:
            self.events.close()


def read_metrics(path: Path) -> list[Mapping[str, Any]]:
    """The records of a metrics.jsonl, none if there is no such file; a torn line, left by a kill, is passed over.

    So is what this file never held: text or a list, say, where a number is. Raises StorageError.
    """
    records: list[Mapping[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from None
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if is_ours(record):
                records.append(record)
    return records


def is_ours(record: Any) -> bool:
    """Whether it has fields, and those that are read again are numbers, or null where they were not finite."""
    if not isinstance(record, dict):
        return False
    steps = record.get("step", 0), record.get("resumed_step", 0)
    whole = all(isinstance(step, int) for step in steps) and isinstance(record.get("time", 0.0), (int, float))
    numbers = [record.get(name) for name in (*READ_AGAIN, *(key for key in record if key.startswith(PARTS)))]
    return (
        whole and isinstance(record.get("metric", ""), str) and all(isinstance(n, int | float | None) for n in numbers)
    )


def steps_alike(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The step records of the last start, and of those before it whose steps were made in the same way.

    A run may go on with other ranks; how long a step takes is told of the ranks that it has now.
    """
    last: Mapping[str, Any] = next((record for record in reversed(records) if record.get("event") == "start"), {})
    found, alike = [], True
    for record in records:
        if record.get("event") == "start":
            alike = all(record.get(key) == last.get(key) for key in OF_A_STEP)
        elif record.get("event") == "step" and alike:
            found.append(record)
    return found


def describe_steps(steps: Sequence[Mapping[str, Any]], ranks: int) -> str:
    """Where the time of a step went and what it sent: medians over step records, in a line for people."""

    def milliseconds(key: str) -> str:
        return f"{1e3 * statistics.median(record.get(key) or 0.0 for record in steps):.2f} ms"

    line = "a step on rank 0: " + ", ".join(
        f"{milliseconds(f'{part}_seconds')} {part}" for part in ("compute", "exchange", "wait")
    )
    if ranks == 1:
        return line
    slowest, times = Counter(record.get("slowest_rank") or 0 for record in steps).most_common(1)[0]
    return (
        f"{line}; {steps[-1].get('wire_bytes') or 0:,} bytes sent, a float32 wire would exchange in "
        f"{milliseconds('wire_seconds_float32')}; rank {slowest} was slowest in {times / len(steps):.0%} of steps"
    )


def describe_noise(metrics: Sequence[Mapping[str, Any]], batch_size: int, ranks: int) -> str:
    """What larger batches and more ranks would bring, in a line; none where the noise of the gradients is not known.

    batch_size: the images of a step, which are no more than there are.
    """
    scale, error = over_a_run([record for record in metrics if record.get("event") == "epoch"], batch_size)
    steps = steps_alike(metrics)
    if not steps:
        return ""
    speed, computing = (
        statistics.median(step.get(key) or 0.0 for step in steps) for key in ("images_per_second", "compute_seconds")
    )
    return advice(scale, error, batch_size, ranks, batch_size / speed if speed else 0.0, computing)


def on_a_terminal() -> bool:
    """Whether a person watches: standard error is a terminal, or that of the launcher that forwards it is."""
    if sys.stderr.isatty():
        return True
    for process, name in parents():
        if not name.startswith(PROCESSES):
            break
        with contextlib.suppress(OSError):  # a launcher of another user
            if str(Path(f"/proc/{process}/fd/2").readlink()).startswith(("/dev/pts/", "/dev/tty")):
                return True
    return False


def _happened(record: Mapping[str, Any], step: int) -> bool:
    return record.get("event") == "start" or (record.get("event") != "final" and record.get("step", 0) <= step)
