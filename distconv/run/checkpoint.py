"""Checkpoints: one safetensors file each, written whole or not at all.

A file holds the parameters by name (value/conv1.W), the optimizer's state vectors likewise (adam: m/..., v/...), and in
its metadata the position of the run and its configuration. There is nothing per rank to save: order, dropout and shards
follow from the seed and the step, so a run may go on with another number of ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distconv.config import Config
from distconv.errors import (
    BadDataError,
    MismatchError,
    MissingInputError,
    StorageError,
    UsageError,
)
from distconv.kernels.interface import Array
from distconv.nn.layerwise import ALL_OPTIMIZERS
from distconv.nn.optimizers import EMA
from distconv.nn.parameters import Parameters, digest
from distconv.run.array_files import not_ours
from distconv.run.files import replacing
from distconv.run.folder import find_checkpoints, step_of
from distconv.run.noise import MOMENTS
from distconv.run.tensorfile import OtherProgramsFileError, TensorFile, write_tensors

FORMAT = "distconv-1"
KEEP = 3  # newest checkpoints that stay
# Else it would be another run.
MUST_MATCH = ("model", "task", "batch_size", "optimizer", "seed", "limit_train", "validation", "ema", "init")
CHANGES = (
    "lr",
    "schedule",
    "warmup_epochs",
    "scale_lr",
    "weight_decay",
    "clip_norm",
    "label_smoothing",
    "augment",
    "patience",
)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return type(value) is str and value != ""


# What must be in each part of a file's description, and what it can be. config is held against Config besides.
DESCRIBED: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "position": {
        **dict.fromkeys(("step", "epoch", "cursor", "samples", "skipped", "best_epoch"), _is_count),
        **dict.fromkeys(
            ("loss_sum", "first_loss", "best_score"), lambda value: type(value) is float and not math.isnan(value)
        ),
        "noise_sums": lambda value: type(value) is list and len(value) == MOMENTS and all(map(_is_finite, value)),
    },
    # Settings that every version has written. Config looks at what all of them are.
    "config": dict.fromkeys(
        ("model", "batch_size", "optimizer", "seed", "limit_train"), lambda value: value is not None
    ),
    "data": {
        "name": _is_text,
        "digest": _is_text,
        "classes": _is_count,
        "image_shape": lambda value: isinstance(value, list) and value != [] and all(map(_is_count, value)),
    },
}
# What older files lack in a part, and what holds for them. A setting that they lack was as it is by default.
SINCE_LATER: Mapping[str, Mapping[str, Any]] = {
    "position": {"first_loss": 0.0, "best_score": -math.inf, "best_epoch": 0, "noise_sums": [0.0] * MOMENTS}
}


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds. position: as Run.position gives it; what an older file lacks is filled in."""

    path: Path
    tensors: TensorFile
    position: Mapping[str, Any]
    config: Config
    data: Mapping[str, Any]  # name, digest, classes, image_shape

    def fill(self, views: Mapping[str, Array]) -> None:
        """Read into arrays by name, which are all that a model has in some slots (value/conv1.W); casts to their dtype.

        Raises MismatchError for another model's, before anything is read, and StorageError.
        """
        slots = {name.split("/")[0] for name in views}
        have = {name: shape for name, shape in self.tensors.shapes.items() if name.split("/")[0] in slots}
        want = {name: view.shape for name, view in views.items()}
        if have != want:
            name = max(dict(have.items() ^ want.items()))  # value/... before m/...
            raise MismatchError(
                f"{self.path} is of another model: {name} has shape {have.get(name, 'none')} there and "
                f"{want.get(name, 'none')} here; name its model by --model"
            )
        try:
            for name, start, piece in self.tensors.pieces(views):
                with np.errstate(over="ignore"):
                    there = views[name].reshape(-1)[start : start + len(piece)]
                    there[...] = piece
                if not np.isfinite(there).all():
                    raise MismatchError(
                        f"{self.path} holds numbers in {name} that are too large for {there.dtype}: give --wire "
                        "float64, as the run had that wrote it"
                    )
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error}") from None


def save_checkpoint(
    folder: Path,
    parameters: Parameters,
    state: Mapping[str, Array],
    position: Mapping[str, Any],
    config: Config,
    data: Mapping[str, Any],
    state_sha256: str = "",
) -> Path:
    """Write step-XXXXXXXXXX.safetensors, whole or not at all, and remove all but the newest. Raises StorageError.

    state: the optimizer's vectors, by slot. state_sha256: what the ranks have agreed on, see Run.digest; a file that
    holds something else is never loaded.
    """
    tensors = parameters.by_slot({"value": parameters.vector, **state})
    about = {
        "format": FORMAT,
        "position": dict(position),
        "config": dataclasses.asdict(config),
        "data": dict(data),
        "state_sha256": state_sha256 or digest(tensors),
    }
    text = json.dumps(about)
    path = folder / f"step-{position['step']:010d}.safetensors"
    try:
        folder.mkdir(exist_ok=True)
        with replacing(path, f".{os.getpid()}") as temporary, temporary.open("wb") as file:
            write_tensors(file, tensors, {"distconv": text, "sha256": digest(tensors, text)})
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(folder)
        # One of a later step than the run has come to is damaged, and must not push out good ones, such as this.
        so_far = [old for old in find_checkpoints(folder) if step_of(old) <= position["step"]]
        for old in [*so_far[KEEP:], *folder.glob(".step-*.safetensors.*.tmp")]:  # a kill leaves these
            old.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"checkpoint {path} cannot be written: {error}; earlier ones are untouched") from None
    return path


def keep_copy(path: Path, copy: Path) -> None:
    """Write the same file at another place, whole or not at all. Raises StorageError."""
    try:
        with replacing(copy) as temporary:
            shutil.copyfile(path, temporary)
    except OSError as error:
        raise StorageError(f"{copy} cannot be written: {error}") from None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a file. Raises MissingInputError, BadDataError for a damaged one, MismatchError, StorageError."""
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # in a folder that may not be entered, or no name that a file can have
        is_file = False
    if not is_file:
        raise MissingInputError(f"{path} is not a file: a checkpoint of distconv.train was expected")
    try:
        tensors = TensorFile(path, wanted="distconv")
        text = tensors.metadata["distconv"]
        whole, state, finite = _digests(text, tensors)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from None
    except OtherProgramsFileError:
        raise not_ours(path, "a safetensors file of another program") from None
    except Exception as error:  # what a header says can make the reader stumble in many ways
        raise BadDataError(f"{path} is not a whole checkpoint ({error}): use an earlier one") from None
    if tensors.metadata.get("sha256") != whole:
        raise BadDataError(f"{path} is damaged, or no checkpoint: its content does not have the SHA-256 it should have")
    return Checkpoint(path, tensors, **_read_about(text, tensors, state, finite, path))


def _read_about(text: str, names: Iterable[str], state: str, finite: bool, path: Path) -> dict[str, Any]:
    """The position, config and data of a file whose SHA-256 is right, so that what uses them need not look again.

    Another version, or another program, may have written them. names, state, finite: of the tensors, and what _digests
    has found in them. Raises BadDataError, MismatchError.
    """
    try:
        about = json.loads(text, object_pairs_hook=_without_repeats, parse_int=_short_int)
        if about["format"] != FORMAT:
            raise MismatchError(f"{path} has the format {str(about['format'])[:40]!r}; this version reads {FORMAT}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadDataError(f"{path} is no checkpoint: its description cannot be read ({error})") from None
    parts: dict[str, Any] = {}
    for part, fields in DESCRIBED.items():
        given = about.get(part)
        parts[part] = {**SINCE_LATER.get(part, {}), **given} if isinstance(given, dict) else {}
        for name, valid in fields.items():
            if not valid(parts[part].get(name)):
                raise BadDataError(
                    f"{path} cannot be used, as its {part} has no {name} that can be: use an earlier one"
                )
    known = {field.name for field in dataclasses.fields(Config)}
    try:
        config = Config(**{name: value for name, value in parts["config"].items() if name in known})
    except UsageError as error:
        raise BadDataError(f"{path} cannot be used, as it was made with {str(error)[:200]}") from None
    found = {name.split("/")[0] for name in names}
    slots = {"value", *(ALL_OPTIMIZERS[config.optimizer].slots if config.optimizer in ALL_OPTIMIZERS else found)}
    slots |= {EMA} if config.ema else set()
    if slots != found or not finite:
        raise BadDataError(f"{path} cannot be used, as it is not {', '.join(sorted(slots))} of finite numbers")
    if about.get("state_sha256", state) != state:  # older files have none
        raise BadDataError(f"{path} does not hold the state that its ranks had agreed on: use an earlier one")
    return {**parts, "config": config}


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints of this step and later ones, so that none is found any more; returns their new names."""
    aside = []
    for path in find_checkpoints(folder):
        if step_of(path) >= step:
            aside.append(path.replace(path.with_name(f"diverged-{path.name}")))
    return aside


def newest_good(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and why newer ones were passed over. Raises BadDataError if all are bad."""
    passed_over: list[str] = []
    for path in find_checkpoints(folder):
        try:
            found = load_checkpoint(path)
            if (step := found.position["step"]) != step_of(path):  # else it would stay the newest for ever
                raise BadDataError(f"{path} holds step {step:,}, which is not that of its name")
            return found, passed_over
        except BadDataError as error:
            passed_over.append(str(error))
    if passed_over:
        raise BadDataError(f"{'; '.join(passed_over)}; no good one is left: start afresh in another --out")
    return None, []


def check_same_run(checkpoint: Checkpoint, config: Config, data_digest: str) -> list[str]:
    """Raise MismatchError where going on would not be the same run; return a line for each setting that may differ."""
    have, want = dataclasses.asdict(checkpoint.config), dataclasses.asdict(config)
    for settings, of in ((have, checkpoint.config), (want, config)):
        settings["batch_size"] = of.step_size  # it may be computed in other parts, which is told
        settings["init"] = of.init and os.path.abspath(of.init)  # noqa: PTH100 (x and ./x are one file)
    parted = checkpoint.config.accumulate > 1 or config.accumulate > 1
    for name in MUST_MATCH:
        if have[name] != want[name]:
            what = "batch_size times accumulate" if parted and name == "batch_size" else name
            raise MismatchError(
                f"{checkpoint.path} was made with {what} = {_shown(have[name])}, not {_shown(want[name])}: "
                f"give the same, or start afresh in another --out"
            )
    if checkpoint.data["digest"] != data_digest:
        raise MismatchError(
            f"{checkpoint.path} was made with the data set {checkpoint.data['name']} of SHA-256 "
            f"{checkpoint.data['digest'][:12]}..., not {data_digest[:12]}...: give the same by --data, or another --out"
        )
    may_differ = (*CHANGES, "accumulate", "wire", "shards", "precision", "epochs", "eval_samples")
    return [f"{name} is now {want[name]}, was {have[name]}" for name in may_differ if have[name] != want[name]]


def _shown(value: Any) -> str:
    """A setting for people, who may not see an empty text."""
    return "none" if value == "" else str(value)


def _digests(text: str, tensors: TensorFile) -> tuple[str, str, bool]:
    """What nn.parameters.digest says of the text and the tensors, and of the tensors alone; whether all is finite.

    Raises OSError.
    """
    whole, state, finite = hashlib.sha256(text.encode()), hashlib.sha256(), True
    for name, start, piece in tensors.pieces(sorted(tensors)):
        head = f"{name} {tensors.shapes[name]} {piece.dtype}".encode() if start == 0 else b""
        for sha in (whole, state):
            sha.update(head)
            sha.update(piece.data)
        finite &= bool(np.isfinite(piece).all())
    return whole.hexdigest(), state.hexdigest(), finite


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Of two fields of one name, programs read the one or the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it says a thing twice")
    return found


def _short_int(digits: str) -> int:
    """A long one would take a time that grows with the square of its length."""
    if len(digits) > 20:
        raise ValueError("it has a number of more than 64 bits")
    return int(digits)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
