"""Checkpoints that another program wrote, with a right checksum: what they say is held against what it can be."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from distconv.errors import BadDataError, DistconvError, MismatchError
from distconv.nn.networks import build_network
from distconv.nn.optimizers import Adam
from distconv.nn.parameters import Parameters, digest
from distconv.run import checkpoint as files
from distconv.run.checkpoint import check_same_run, load_checkpoint
from distconv.run.run import Run
from tests.files import peak_memory
from tests.test_checkpoint import CONFIG, DATA, SPECS, content, position, refused


def forged(about: Mapping[str, Any] | str, arrays: Mapping[str, np.ndarray] | None = None) -> bytes:
    """A file with a right SHA-256 that says this about these arrays."""
    text = about if isinstance(about, str) else json.dumps(about)
    arrays = good_arrays() if arrays is None else arrays
    return save(dict(arrays), {"distconv": text, "sha256": digest(arrays, text)})


def good_about() -> dict[str, Any]:
    return {
        "format": files.FORMAT,
        "position": {**position(5), "first_loss": 2.3},
        "config": dataclasses.asdict(CONFIG),
        "data": DATA,
    }


def good_arrays(dtype: type = np.float32) -> dict[str, np.ndarray]:
    named = Parameters(SPECS).named
    slots = content(1, dtype).items()
    return {f"{slot}/{name}": view for slot, vector in slots for name, view in named(vector).items()}


def changed(part: str, name: str, value: Any) -> dict[str, Any]:
    about = good_about()
    return {**about, part: {**about[part], name: value}}


def without(part: str, name: str) -> dict[str, Any]:
    about = good_about()
    return {**about, part: {key: value for key, value in about[part].items() if key != name}}


def nested(depth: int) -> str:
    return json.dumps(good_about())[:-1] + ', "more": ' + "[" * depth + "]" * depth + "}"


def use(path: Path) -> None:
    """All that train, evaluate and misclassified do with a checkpoint's content."""
    checkpoint = load_checkpoint(path)
    for dtype in (np.float32, np.float64):
        parameters = Parameters(SPECS, dtype)
        check_same_run(checkpoint, CONFIG, DATA["digest"])
        state = Adam(0.001).new_state(parameters.size, dtype)
        replica = SimpleNamespace(push=lambda: None, parameters=parameters, state=state)
        run = Run(None, None, None, replica, None, None, None)  # type: ignore[arg-type]
        checkpoint.fill(parameters.by_slot(run.vectors()))
        run.restore(dict(checkpoint.position), run.vectors())
        f"{run.step:,} {run.loss_sum / (run.samples or 1):.4f}"
    Parameters(build_network(checkpoint.config.model, (28, 28, 1), 10, (10,))[1])


def test_a_file_forged_by_the_rules_is_read(tmp_path: Path) -> None:
    path = tmp_path / "step-0000000005.safetensors"
    for raw in (
        forged(good_about()),
        *(forged(without(*there)) for there in (("position", "first_loss"), ("config", "validation"))),  # once unknown
        forged(changed("position", "what_a_later_version_adds", [1])),
        forged(changed("config", "what_a_later_version_adds", [1])),
        forged(changed("position", "loss_sum", math.inf)),
    ):
        path.write_bytes(raw)
        use(path)


ODD = [None, True, -1, 2**63, 10**30, 0.5, 1e308, math.nan, -math.inf, "", "x", "\ud800", "a\0b", [], [1, "a"], {}]
REFUSED = {
    **{
        f"{part}.{name} = {odd!r}": lambda part=part, name=name, odd=odd: forged(changed(part, name, odd))
        for part in ("position", "config", "data")
        for name in {**good_about()[part]}
        for odd in (None, [], {"a": {}}, -(10**30))
    },
    **{
        f"no {part}.{name}": lambda part=part, name=name: forged(without(part, name))
        for part, names in (
            ("position", set(position(1))),
            ("config", set(files.DESCRIBED["config"])),
            ("data", set(DATA)),
        )
        for name in sorted(names)
    },
    **{
        f"{part} = {odd!r}": lambda part=part, odd=odd: forged({**good_about(), part: odd})
        for part in ("position", "config", "data", "format")
        for odd in (None, [], "x", 3, {})
    },
    "deep nesting": lambda: forged(nested(200_000)),
    "a long number": lambda: forged(nested(1).replace("[]", "1" * 100_000)),
    "a thing twice": lambda: forged(nested(1).replace('"more": []', '"format": "distconv-1"')),
    "no JSON": lambda: forged("{"),
    "a list": lambda: forged("[]"),
    "NaN for a sum": lambda: forged(changed("position", "loss_sum", math.nan)),
    "another state than was agreed on": lambda: forged({**good_about(), "state_sha256": "0" * 64}),
    "no state": lambda: forged({**good_about(), "state_sha256": None}),
    "NaN in a tensor": lambda: forged(good_about(), {**good_arrays(), "m/conv1.b": np.array([0, np.nan], "f4")}),
    "infinity in a tensor": lambda: forged(
        good_about(), {**good_arrays(), "value/conv1.b": np.array([0, np.inf], "f4")}
    ),
    "no values": lambda: forged(
        good_about(), {name: array for name, array in good_arrays().items() if not name.startswith("value")}
    ),
    "no moments": lambda: forged(
        good_about(), {name: array for name, array in good_arrays().items() if name.startswith("value")}
    ),
    "other moments": lambda: forged(good_about(), {**good_arrays(), "x/conv1.b": np.zeros(2, "f4")}),
    "no tensors": lambda: forged(good_about(), {}),
    **{
        f"numbers of {kind}": lambda kind=kind: forged(
            good_about(), {name: np.zeros(array.shape, kind) for name, array in good_arrays().items()}
        )
        for kind in ("f2", "i4", "u1", "?", "c8")
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_right_checksum_covers_is_not_believed_either(tmp_path: Path, name: str) -> None:
    refused(tmp_path / "step-0000000005.safetensors", REFUSED[name]())


def test_a_million_names_are_refused_before_they_are_read(tmp_path: Path) -> None:
    names = b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6))
    raw = struct.pack("<Q", len(names) + 2) + b"{" + names + b"}"
    path = tmp_path / "step-0000000005.safetensors"
    path.write_bytes(raw)

    def read() -> None:
        with pytest.raises(BadDataError, match="header"):
            load_checkpoint(path)

    assert peak_memory(read) < 1 << 20


def test_numbers_too_large_for_a_narrower_run_are_told_and_not_made_infinite(tmp_path: Path) -> None:
    arrays = good_arrays(np.float64)  # among them the largest float64
    path = tmp_path / "step-0000000005.safetensors"
    path.write_bytes(forged(good_about(), arrays))
    with pytest.raises(MismatchError, match=r"too large for float32.*--wire float64"):
        parameters = Parameters(SPECS)
        load_checkpoint(path).fill({f"value/{k}": view for k, view in parameters.named(parameters.vector).items()})


def test_no_description_makes_anything_but_a_sentence(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "step-0000000005.safetensors"
    for _ in range(600):
        about = json.loads(json.dumps(good_about()))
        for _ in range(draw.randint(1, 2)):
            part = about[draw.choice(("position", "config", "data"))]
            part[draw.choice(sorted(part))] = draw.choice(ODD)
        path.write_bytes(forged(about))
        with contextlib.suppress(DistconvError):
            use(path)
