"""Checkpoints: whole or not there, whatever ends a save and whatever happens to the file later."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from distconv.config import Config
from distconv.errors import BadDataError, MismatchError, MissingInputError, StorageError
from distconv.nn.optimizers import Adam
from distconv.nn.parameters import Parameters, Spec
from distconv.run import checkpoint as files
from distconv.run.checkpoint import Checkpoint, check_same_run, load_checkpoint, newest_good
from distconv.run.folder import find_checkpoints
from distconv.run.tensorfile import TensorFile
from tests.files import peak_memory, python

SPECS = {"conv1": {"W": Spec((3, 3, 1, 2)), "b": Spec((2,))}, "affine1": {"W": Spec((4, 5)), "b": Spec((5,))}}
DATA = {"name": "digits", "digest": "d" * 64, "classes": 10, "image_shape": [28, 28, 1]}
CONFIG = Config()


def content(step: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """What a step's checkpoint holds: any finite number, the awkward ones too."""
    size = Parameters(SPECS).size
    vectors = np.random.default_rng(step).standard_normal((3, size)).astype(dtype)
    vectors[0, :4] = -0.0, np.finfo(dtype).tiny / 8, np.finfo(dtype).max, np.finfo(dtype).min
    return dict(zip(("value", "m", "v"), vectors, strict=True))


def position(step: int) -> dict[str, Any]:
    done = {"step": step, "epoch": step // 5, "cursor": 100 * (step % 5)}
    return {**done, "loss_sum": 0.1 * step, "samples": step, "skipped": 0}


def write(folder: Path, step: int, dtype: type = np.float32, config: Config = CONFIG) -> Path:
    parameters = Parameters(SPECS, dtype)
    state = Adam(0.001).new_state(parameters.size, dtype)
    parameters.vector[...], state["m"][...], state["v"][...] = content(step, dtype).values()
    return files.save_checkpoint(folder, parameters, state, position(step), config, DATA)


def assert_holds(checkpoint: Checkpoint | None, step: int, dtype: type = np.float32) -> None:
    assert checkpoint is not None and checkpoint.position["step"] == step
    vectors = filled(checkpoint, Parameters(SPECS, dtype))
    assert {name.split("/")[0] for name in checkpoint.tensors} == set(vectors)
    for slot, vector in content(step, dtype).items():
        assert vectors[slot].tobytes() == vector.tobytes()


def filled(checkpoint: Checkpoint, parameters: Parameters) -> dict[str, np.ndarray]:
    """The vectors of a model after a fill."""
    vectors = {slot: np.empty_like(parameters.vector) for slot in ("value", "m", "v")}
    checkpoint.fill(by_name(parameters, vectors))
    return vectors


def by_name(parameters: Parameters, vectors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{slot}/{name}": view for slot, of in vectors.items() for name, view in parameters.named(of).items()}


def refused(path: Path, raw: bytes) -> None:
    """Write these bytes in the place of a checkpoint and see them refused with the file's name."""
    path.write_bytes(raw)
    with pytest.raises((BadDataError, MismatchError), match=str(path)):
        load_checkpoint(path)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_bit_of_parameters_and_moments_comes_back(tmp_path: Path, dtype: type) -> None:
    path = write(tmp_path / "new", 12, dtype, Config(seed=7, out='odd "name"'))
    assert path.name == "step-0000000012.safetensors"
    checkpoint = load_checkpoint(path)
    assert_holds(checkpoint, 12, dtype)
    assert checkpoint.position == {**files.SINCE_LATER["position"], **position(12)}
    assert checkpoint.config == Config(seed=7, out='odd "name"') and checkpoint.data == DATA


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, 12)
    file = TensorFile(path)
    path.write_bytes(save(dict(file), dict(file.metadata)))  # as they were written, in another order
    assert_holds(load_checkpoint(path), 12)


def test_neither_a_save_nor_a_load_copies_a_large_model(tmp_path: Path) -> None:
    parameters = Parameters({"affine1": {"W": Spec((1000, 4000))}})
    state = Adam(0.001).new_state(parameters.size, np.float32)
    position = {"step": 1, "loss_sum": 0.0, "samples": 1, "skipped": 0, "epoch": 0, "cursor": 1}

    def save_and_load() -> None:
        path = files.save_checkpoint(tmp_path, parameters, state, position, CONFIG, DATA)
        load_checkpoint(path).fill(by_name(parameters, {"value": parameters.vector, **state}))

    assert peak_memory(save_and_load) < parameters.vector.nbytes / 4


def test_the_newest_three_stay_whatever_the_clock_says(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        os.utime(write(tmp_path, step), (1e9 - step, 1e9 - step))  # the newest looks oldest
    assert [path.name for path in find_checkpoints(tmp_path)] == [f"step-{n:010d}.safetensors" for n in (11, 10, 9)]
    assert_holds(newest_good(tmp_path)[0], 11)


def test_a_copy_that_cannot_take_its_place_leaves_nothing_behind(tmp_path: Path) -> None:
    path, taken = write(tmp_path / "checkpoints", 1), tmp_path / "best.safetensors"
    taken.mkdir()
    with pytest.raises(StorageError, match=r"best\.safetensors cannot be written"):
        files.keep_copy(path, taken)
    assert {*tmp_path.iterdir()} == {path.parent, taken}


def test_no_checkpoint_is_none_and_no_error(tmp_path: Path) -> None:
    assert newest_good(tmp_path) == (None, [])
    assert newest_good(tmp_path / "none") == (None, [])
    with pytest.raises(MissingInputError, match="none"):
        load_checkpoint(tmp_path / "none")


def test_other_files_are_ignored_and_left_alone(tmp_path: Path) -> None:
    torn = ".step-0000000009.safetensors.77.tmp"  # what a kill in the middle of a save leaves
    strays = ["notes.txt", "model.safetensors", "step-9.safetensors.bak"]
    mine = ["step-best.safetensors", "step-good.safetensors", "step-keep.safetensors"]  # copies that a user made
    for stray in (*strays, *mine, torn):
        (tmp_path / stray).write_bytes(b"not written by a run")
    (tmp_path / "step-0000000099.safetensors").mkdir()
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    checkpoint, passed_over = newest_good(tmp_path)
    assert_holds(checkpoint, 4)
    assert passed_over == []
    assert all((tmp_path / name).exists() for name in (*strays, *mine, "step-0000000099.safetensors"))
    assert not (tmp_path / torn).exists()
    assert len(list(tmp_path.glob("step-000000000?.*"))) == files.KEEP


def test_a_truncated_newest_is_passed_over_and_named(tmp_path: Path) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    whole = newest.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        newest.write_bytes(whole[:length])
        checkpoint, passed_over = newest_good(tmp_path)
        assert_holds(checkpoint, 1)
        assert len(passed_over) == 1 and str(newest) in passed_over[0]


@pytest.mark.parametrize("part", ["header", "numbers"])
def test_a_flipped_bit_anywhere_in_the_newest_is_passed_over_and_named(tmp_path: Path, part: str) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    whole = newest.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    padding = header - len(whole[:header].rstrip())  # blanks that mean nothing
    places = range(header - padding) if part == "header" else range(header, len(whole))
    unnoticed = []
    for place in random.Random(0).sample(places, 200):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        newest.write_bytes(damaged)
        try:
            checkpoint, passed_over = newest_good(tmp_path)
            assert_holds(checkpoint, 1)
            assert len(passed_over) == 1 and str(newest) in passed_over[0]
        except Exception as error:
            around = bytes(damaged[max(0, place - 20) : place + 10])
            unnoticed.append(f"byte {place}, {around!r}: {type(error).__name__}")
    assert unnoticed == []


def test_damaged_ones_never_push_out_the_good_one(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    for step in (20, 30):
        (tmp_path / f"step-{step:010d}.safetensors").write_bytes(b"torn")
    for step in (11, 12, 13):
        assert newest_good(tmp_path)[0] is not None
        write(tmp_path, step)
        assert_holds(newest_good(tmp_path)[0], step)


def test_an_older_one_under_a_later_name_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 1).rename(tmp_path / "step-0000000999.safetensors")
    write(tmp_path, 2)
    checkpoint, (passed_over,) = newest_good(tmp_path)
    assert_holds(checkpoint, 2)
    assert "step-0000000999" in passed_over and "holds step 1" in passed_over


def test_bad_ones_alone_are_an_error_that_names_them_all(tmp_path: Path) -> None:
    paths = [write(tmp_path, step) for step in (1, 2)]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadDataError) as caught:
        newest_good(tmp_path)
    assert all(str(path) in str(caught.value) for path in paths)


def tensors(header: dict[str, Any], numbers: bytes) -> bytes:
    """A safetensors file with this header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def two(kind: str, offsets: list[int], shape: tuple[int, ...] = (2,)) -> bytes:
    return tensors({"w": {"dtype": kind, "shape": shape, "data_offsets": offsets}}, bytes(4))


@pytest.mark.parametrize(
    "raw",
    [
        b"GIF89a" + bytes(100),
        struct.pack("<Q", 2**60) + b"{}",
        tensors({}, b""),
        two("F16", [0, 4]),
        two("BF16", [0, 4]),  # a type that NumPy lacks
        two("F16", [-4, 0]),
        two("F16", [0, 4], (2**40, 2**40)),
        save({"w": np.ones(2)}),
        save({"w": np.ones(2)}, {"format": "pt"}),
        *(save({"w": np.ones(2)}, {"distconv": text}) for text in ("", "[]", '{"format": "distconv-0"}')),
        *(save({"w": np.ones(2)}, {"distconv": json.dumps({"format": kind})}) for kind in (files.FORMAT, [1])),
    ],
    ids=lambda raw: repr(raw[8:60]),
)
def test_what_is_no_checkpoint_of_distconv_is_refused(tmp_path: Path, raw: bytes) -> None:
    refused(tmp_path / "step-0000000001.safetensors", raw)


def test_a_pickle_named_as_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    refused(tmp_path / "step-0000000001.safetensors", b"cos\nmkdir\n(V%b\ntR." % str(canary).encode())
    assert not canary.exists()


@pytest.mark.parametrize(
    ("specs", "name"),
    [
        ({**SPECS, "conv1": {"W": Spec((3, 3, 2, 2)), "b": Spec((2,))}}, "conv1.W"),
        ({"conv1": SPECS["conv1"]}, "affine1"),
        ({**SPECS, "affine2": {"b": Spec((5,))}}, "affine2.b"),
        ({**SPECS, "affine1": {"W": Spec((5, 4)), "b": Spec((5,))}}, "affine1.W"),  # as many numbers
    ],
)
def test_another_models_checkpoint_is_refused_by_the_name_of_an_array(tmp_path: Path, specs: Any, name: str) -> None:
    checkpoint = load_checkpoint(write(tmp_path, 1))
    with pytest.raises(MismatchError, match=f"step-0000000001.*/{name}"):
        filled(checkpoint, Parameters(specs))


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 50), ("model", "simpleconvnet"), ("task", "mine:task"), ("validation", 9), ("ema", 0.5)],
)
def test_a_setting_that_makes_it_another_run_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    checkpoint = load_checkpoint(write(tmp_path, 1))
    with pytest.raises(MismatchError) as caught:
        check_same_run(checkpoint, Config(**{name: value}), DATA["digest"])
    assert all(part in str(caught.value) for part in (name, str(getattr(CONFIG, name)), str(value)))
    with pytest.raises(MismatchError, match="digits"):
        check_same_run(checkpoint, CONFIG, "e" * 64)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.5),
        ("wire", "float32"),
        ("epochs", 30),
        ("schedule", "cosine"),
        ("warmup_epochs", 0.5),
        ("scale_lr", "sqrt"),
        ("weight_decay", 0.25),
        ("label_smoothing", 0.125),
        ("augment", "mnist"),
    ],
)
def test_a_setting_that_may_change_is_reported_in_a_line(tmp_path: Path, name: str, value: Any) -> None:
    checkpoint = load_checkpoint(write(tmp_path, 1))
    assert check_same_run(checkpoint, CONFIG, DATA["digest"]) == []
    (line,) = check_same_run(checkpoint, Config(**{name: value}), DATA["digest"])
    assert all(part in line for part in (name, str(getattr(CONFIG, name)), str(value)))


def test_another_number_of_parts_of_a_step_is_reported_as_batch_norm_takes_its_statistics_from_them(
    tmp_path: Path,
) -> None:
    checkpoint = load_checkpoint(write(tmp_path, 1))
    parted = Config(batch_size=CONFIG.batch_size // 4, accumulate=4)
    assert check_same_run(checkpoint, parted, DATA["digest"]) == ["accumulate is now 4, was 1"]
    with pytest.raises(MismatchError, match="batch_size times accumulate = 100, not 200"):
        check_same_run(checkpoint, Config(batch_size=100, accumulate=2), DATA["digest"])


POINTS = ("open", "write", "fsync of the file", "replace", "fsync of the folder", "unlink of the oldest")
BEFORE, AFTER = POINTS[:4], POINTS[4:]  # the rename: until then the new file is not there


@contextlib.contextmanager
def broken_at(point: str, happen: Callable[[], Any]) -> Iterator[None]:
    """Let something happen at one point of a save."""
    with pytest.MonkeyPatch.context() as patch:
        if point == "write":

            class HalfWritten(io.FileIO):
                def write(self, content: Any) -> int:
                    super().write(content[: len(content) // 2])
                    return happen()

            patch.setattr(Path, "open", lambda path, mode: HalfWritten(path, mode))
        elif point.startswith("fsync"):
            calls, real = iter(POINTS[2::2]), os.fsync  # first the file, then the folder
            patch.setattr(os, "fsync", lambda handle: happen() if next(calls) == point else real(handle))
        elif point.startswith("unlink"):

            def unlink(path: Path, missing_ok: bool, real: Callable[..., None] = Path.unlink) -> None:
                happen() if path.name.startswith("step-") else real(path, missing_ok)  # .step-... comes before

            patch.setattr(Path, "unlink", unlink)
        else:
            patch.setattr(Path, point, lambda *arguments, **options: happen())
        yield


def fail() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("point", POINTS)
def test_a_save_that_fails_says_so_and_leaves_the_earlier_ones(tmp_path: Path, point: str) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    with broken_at(point, fail), pytest.raises(StorageError, match=r"step-0000000004.*No space left"):
        write(tmp_path, 4)
    checkpoint, passed_over = newest_good(tmp_path)
    assert_holds(checkpoint, 3 if point in BEFORE else 4)
    assert passed_over == []
    assert_holds(load_checkpoint(tmp_path / "step-0000000003.safetensors"), 3)
    assert not list(tmp_path.glob("*tmp*")) and not list(tmp_path.glob(".*"))


def crash_everywhere(folder: Path) -> None:
    """Run in a fresh process: save in one child for each point, which ends there without another instruction."""
    for point in POINTS:
        for step in (1, 2, 3):
            write(folder / point, step)
        if (child := os.fork()) == 0:
            with broken_at(point, lambda: os._exit(9)):
                write(folder / point, 4)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, f"{point} was not reached"


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crashed")
    code = "import sys, pathlib; from tests.test_checkpoint import crash_everywhere as f; f(pathlib.Path(sys.argv[1]))"
    result = python("-c", code, folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_in_the_middle_of_a_save_leaves_the_earlier_state_or_the_new_one(crashed: Path, point: str) -> None:
    checkpoint, passed_over = newest_good(crashed / point)
    assert_holds(checkpoint, 3 if point in BEFORE else 4)
    assert passed_over == []
    write(crashed / point, 5)
    assert_holds(newest_good(crashed / point)[0], 5)
