"""The folder of a run: whose it is, who writes to it, and whether anything is left to do in it.

Rank 0 alone writes there, but for the reports of ranks that fail. What distconv has not made is neither deleted nor
overwritten, a second job is kept out, and a finished run is left as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from distconv import errors
from distconv.comm.world import World
from distconv.config import Config
from distconv.run.files import write_text
from distconv.run.log import read_metrics

if TYPE_CHECKING:
    from distconv.run.checkpoint import Checkpoint

LOCK = ".distconv-lock"  # stays, and so marks the folder as ours
PATIENCE = 10.0  # seconds for the job that holds the folder to go; one that was killed may still be dying
BEST = "best.safetensors"  # the state of the epoch that was best on the validation set
REWRITTEN = (  # what a run writes over, or deletes
    "config.toml", "metrics.jsonl", "curves.png", "report.html", "answers.npz", BEST, "DONE", "errors",
)  # fmt: skip
EVENTS = "tensorboard"  # the folder of event files, to which each start of a run adds one
REPORT = re.compile(r"rank-\d+\.json")
CHECKPOINT = re.compile(r"step-\d{10,}\.safetensors")  # not a copy that a user made and named


def members(folder: Path) -> list[Path]:
    """The folder, or those of the runs in it where it is that of --ensemble. What cannot be read is as it is given."""
    try:
        found = sorted(folder.glob("member-*/metrics.jsonl"), key=lambda path: (len(path.parent.name), path))
        return [path.parent for path in found] if found and not (folder / "metrics.jsonl").exists() else [folder]
    except (OSError, ValueError):  # a name that no file can have, or a folder that may not be entered
        return [folder]


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files in a folder, newest step first; links too, though what they lead to may not be there now."""
    named = (path for path in folder.glob("step-*.safetensors") if CHECKPOINT.fullmatch(path.name))
    return sorted((path for path in named if path.is_file() or path.is_symlink()), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in the name of such a file."""
    return int(checkpoint.stem.removeprefix("step-"))


def check_folder(settings: Config, world: World) -> Mapping[str, Any] | None:
    """Look whether the run can have its folder, before anything takes long; nothing in it is changed.

    Returns the final record of a run that is finished there, None where something is left to do. Raises on all ranks
    CannotCreateError, MissingInputError, MismatchError, and what a damaged checkpoint raises.
    """

    def look() -> Mapping[str, Any] | None:
        out = Path(settings.out or "runs")
        try:
            str(out).encode()  # config.toml will hold it
            final = _look_into(out, settings) if settings.out else None
            if final is None:
                try_to_write(out, *[EVENTS] * settings.tensorboard)
        except (OSError, ValueError) as error:
            raise cannot_be_written(out, error) from None
        return final

    return world.on_rank_0(look)


@contextlib.contextmanager
def held_folder(settings: Config, world: World, say: Callable[[str], None]) -> Iterator[Path]:
    """The folder of the run, made by rank 0 and kept from other jobs for as long as the context lasts.

    Raises CannotCreateError on all ranks.
    """
    with contextlib.ExitStack() as held:

        def hold() -> Path:
            out = make_folder(settings)
            try:
                held.enter_context(_lock(out, say))
                _refuse_second_run(out, settings)  # that another job has begun since the first look
            except OSError as error:
                raise cannot_be_written(out, error) from None
            return out

        yield world.on_rank_0(hold)


def make_ready(out: Path, settings: Config, checkpoint: Checkpoint | None, say: Callable[[str], None]) -> None:
    """Bring a folder that this job holds to where a run goes on from a checkpoint, or starts; on rank 0.

    Raises MismatchError where it would not go on, and nothing is changed then; CannotCreateError, StorageError.
    """
    if checkpoint is not None:
        _refuse_vain_changes(checkpoint, settings)
    elif steps := sum(record.get("event") == "step" for record in read_metrics(out / "metrics.jsonl")):
        say(f"{out} has no checkpoint yet: the run starts again, without the {steps:,} steps of its metrics.jsonl")
    there = find_checkpoints(out / "checkpoints")
    damaged = there[: there.index(checkpoint.path)] if checkpoint and checkpoint.path in there else []
    try:
        (out / "checkpoints").mkdir(exist_ok=True)
        for path in damaged:
            aside = path.replace(path.with_name(f"damaged-{path.name}"))  # it must not count among those that are kept
            say(f"set aside as {aside}")
        (out / "DONE").unlink(missing_ok=True)
        if (out / "errors").exists():
            for report in filter(_is_report, (out / "errors").iterdir()):
                report.unlink()
            (out / "errors").rmdir()  # whoever makes it is the first to fail
    except OSError as error:
        raise cannot_be_written(out, error) from None
    write_text(out / "config.toml", settings.toml())


def cannot_be_written(out: Path, error: OSError | ValueError) -> errors.CannotCreateError:
    why: object = error
    if isinstance(error, OSError) and error.strerror:
        inside = error.filename is not None and out in Path(str(error.filename)).parents
        what = "a file or a broken link has this name" if isinstance(error, FileExistsError) else error.strerror
        why = f"{error.filename}: {what}" if inside else what
    return errors.CannotCreateError(f"--out {str(out)!r} cannot be written ({why}): give a folder that can be")


def make_folder(settings: Config) -> Path:
    """The folder that --out names, made if it is not there, or else a new one. Raises CannotCreateError."""
    out = Path(settings.out)
    try:
        if not settings.out:
            return new_folder(settings.model)
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise cannot_be_written(out, error) from None
    return out


def new_folder(model: str) -> Path:
    """Make a folder under runs/ that was not there: two runs may start in the same second."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{model.split(':')[-1]}"
    Path("runs").mkdir(exist_ok=True)
    for n in itertools.count(1):
        path = Path("runs") / f"{name}{f'-{n}' * (n > 1)}"
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            break
    return path


def _look_into(out: Path, settings: Config) -> Mapping[str, Any] | None:
    """Refuse a folder that this run may not have; return the final record of a run that is finished there."""
    _refuse_what_is_not_ours(out, *[EVENTS] * settings.tensorboard)
    _refuse_second_run(out, settings)
    if settings.resume == "auto":
        _refuse_lost_checkpoints(out)
        if final := _finished(out, settings):
            return final
    if (out / LOCK).exists():
        with _open_lock(out) as file:
            _acquire(file, out)  # ends here where another job has it, before this one takes the memory of its GPU
    return None


def _refuse_what_is_not_ours(out: Path, *more: str) -> None:
    """more: names of what else this run would write."""
    if (out / LOCK).exists() or any(map(_is_start, read_metrics(out / "metrics.jsonl"))):
        reports = (out / "errors").iterdir() if (out / "errors").exists() else ()
        taken = [f"errors/{path.name}" for path in reports if not _is_report(path)]
        taken += [name for name in REWRITTEN[:-1] if (out / name).exists() and not (out / name).is_file()]
    else:
        taken = [name for name in (*REWRITTEN, *more) if os.path.lexists(out / name)]
    if taken:
        raise errors.CannotCreateError(
            f"--out {out} holds {', '.join(taken)}, which distconv did not make and would write over: "
            "give a folder of its own, or move that away"
        )


def _is_start(record: Mapping[str, Any]) -> bool:
    versions = record.get("versions")
    return record.get("event") == "start" and isinstance(versions, dict) and "distconv" in versions


def _is_report(path: Path) -> bool:
    return bool(REPORT.fullmatch(path.name))


def _refuse_second_run(out: Path, settings: Config) -> None:
    if settings.resume != "auto" and (
        find_checkpoints(out / "checkpoints")
        or any(record.get("event") != "start" for record in read_metrics(out / "metrics.jsonl"))
    ):
        raise errors.CannotCreateError(
            f"--out {out} holds a run already: with --resume {settings.resume} give a folder of its own"
        )


def _refuse_lost_checkpoints(out: Path) -> None:
    """Raise MissingInputError where a run has left metrics, and must have left a checkpoint, but there is none."""
    if find_checkpoints(out / "checkpoints"):
        return
    events = [record.get("event") for record in read_metrics(out / "metrics.jsonl")]
    # A run makes the folder before its first step, and may come far without a state that is worth saving.
    there = (out / "checkpoints").exists()
    if ("final" if there else "step") in events and not (there and any((out / "checkpoints").iterdir())):
        raise errors.MissingInputError(
            f"{out / 'metrics.jsonl'} tells of a run, but its checkpoints are gone from {out / 'checkpoints'}: put "
            "them back to go on, or give another --out to start afresh"
        )


def _finished(out: Path, settings: Config) -> Mapping[str, Any] | None:
    """The final record of a run that is finished, its model whole; None where something is left to do.

    Raises MismatchError where other settings are asked for, which would train nothing.
    """
    from distconv.run.checkpoint import newest_good

    last = read_metrics(out / "metrics.jsonl")[-1:] if (out / "DONE").exists() else []
    known = bool(last) and last[0].get("event") == "final"
    if not known or None in (last[0].get(name) for name in (_score_of(last[0]), "correct", "total")):
        return None
    found, _ = newest_good(out / "checkpoints")
    if found is None or found.position["step"] != last[0].get("step") or not _is_over(found, settings):
        return None
    if settings.data != found.config.data:
        return None  # it may be the same under another name, which only the data can tell
    _refuse_vain_changes(found, settings)
    return last[0]


def _is_over(found: Checkpoint, settings: Config) -> bool:
    epoch, best = found.position["epoch"], found.position["best_epoch"]
    return settings.epochs <= epoch or settings.is_out_of_patience(epoch, best)


def _score_of(final: Mapping[str, Any]) -> str:
    """Under which name a final record has the test score."""
    return f"test_{final.get('metric', 'accuracy')}"


def _refuse_vain_changes(found: Checkpoint, settings: Config) -> None:
    """Raise MismatchError where nothing is left to train, but other settings are asked for than those of the run."""
    from distconv.run.checkpoint import check_same_run

    done = (found.position["epoch"], found.position["cursor"])
    if done < (settings.epochs, 0):
        return
    of_that_length = dataclasses.replace(settings, epochs=found.config.epochs)
    changes = check_same_run(found, of_that_length, found.data["digest"])
    if done > (settings.epochs, 0):
        changes.append(f"epochs is now {settings.epochs}, after {done[0]}")
    if changes:
        raise errors.MismatchError(
            f"{found.path} is trained to its end, and nothing would be trained with the change: {', '.join(changes)}; "
            "give the settings of the run, more --epochs, or another --out"
        )


def try_to_write(out: Path, *more: str) -> None:
    """Raise OSError where the folder, or one of these in it, cannot be made or written, and leave nothing behind."""
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    # Another job that tries the same at this moment may take the folder away, or have its own file in it.
    with contextlib.suppress(FileExistsError):  # of a folder that comes and goes; what is none is found out below
        out.mkdir(parents=True, exist_ok=True)
    for folder in (out, out / "checkpoints", *(out / name for name in more)):
        with contextlib.suppress(FileNotFoundError), tempfile.TemporaryFile(dir=folder):
            pass
    for folder in new:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _lock(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other jobs out of a folder until this process leaves the context or dies. Raises CannotCreateError."""
    with _open_lock(out) as file:
        if trouble := _acquire(file, out):
            say(f"{out} cannot be locked ({trouble}): see to it yourself that no other job writes there")
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        os.fsync(file.fileno())  # for other hosts
        yield


def _open_lock(out: Path) -> IO[str]:
    """Its file, made if need be. Raises OSError, also where it is a link: to what it leads is not ours to write."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    return os.fdopen(os.open(out / LOCK, flags, 0o666), "a+")


def lock_file(out: Path) -> int | None:
    """The number of the lock's file, another if somebody has replaced it; None where there is none."""
    try:
        return (out / LOCK).stat().st_ino
    except FileNotFoundError:
        return None


def _acquire(file: IO[str], out: Path) -> str:
    """Wait a little for the lock. Returns why there can be none, "" where all is well; raises CannotCreateError."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                raise errors.CannotCreateError(
                    f"--out {out} is in use by another job ({file.read().strip()}): wait for its end, or give a folder "
                    "of its own"
                ) from None
            time.sleep(0.1)
        except OSError as error:  # some file systems know no locks
            return error.strerror or str(error)
