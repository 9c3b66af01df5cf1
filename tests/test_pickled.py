"""The source's pickles: its own numbers come out, and nothing of a hostile file runs."""

from __future__ import annotations

import codecs
import contextlib
import functools
import os
import pickle
import random
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distconv.errors import BadDataError, MismatchError
from distconv.nn.layers import Context
from distconv.nn.networks import build_network
from distconv.nn.parameters import Parameters
from distconv.run.layout import check, fill, places
from distconv.run.pickled import read_pickle
from tests.files import peak_memory, python

Arrays = dict[str, Any]
MIB = 1 << 20
DEEP = [(16, 1), (16, 1), (32, 1), (32, 2), (64, 1), (64, 1)]  # filters and padding; every second one is pooled


def random_parameters(shapes: list[tuple[int, ...]]) -> Arrays:
    """Wk and bk as the source keeps them, of a size that lets every layer tell."""
    draw = np.random.default_rng(0).standard_normal
    arrays = {}
    for k, shape in enumerate(shapes, start=1):
        outputs, fan_in = (shape[0], np.prod(shape[1:])) if len(shape) == 4 else (shape[1], shape[0])
        arrays[f"W{k}"], arrays[f"b{k}"] = draw(shape) * np.sqrt(2 / fan_in), draw(outputs) * 0.1
    return arrays


def deep_parameters(C: int = 1, last: int = 64 * 4 * 4) -> Arrays:
    filters = [C, *(count for count, _ in DEEP)]
    convolutions = [(filters[i + 1], filters[i], 3, 3) for i in range(6)]
    return random_parameters([*convolutions, (last, 50), (50, 10)])


SIMPLE = random_parameters([(30, 1, 5, 5), (30 * 12 * 12, 100), (100, 10)])


def conv(x: np.ndarray, W: np.ndarray, b: np.ndarray, pad: int) -> np.ndarray:
    """x (N, C, H, W), W (F, C, K, K) -> (N, F, OH, OW), with ReLU."""
    x, K = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad))), W.shape[2]
    rows, columns = x.shape[2] - K + 1, x.shape[3] - K + 1
    windows = ((x[:, :, i : i + rows, j : j + columns], W[:, :, i, j]) for i in range(K) for j in range(K))
    return np.maximum(sum(np.einsum("nchw,fc->nfhw", window, w) for window, w in windows) + b[:, None, None], 0)


def pool(x: np.ndarray) -> np.ndarray:
    N, C, H, W = x.shape
    return x.reshape(N, C, H // 2, 2, W // 2, 2).max((3, 5))


def deep_scores(x: np.ndarray, p: Arrays) -> np.ndarray:
    """The source's DeepConvNet on (N, C, H, W): it flattens (C, H, W), and dropout halves in inference."""
    for k, (_, pad) in enumerate(DEEP, start=1):
        x = conv(x, p[f"W{k}"], p[f"b{k}"], pad)
        x = pool(x) if k % 2 == 0 else x
    hidden = np.maximum(x.reshape(len(x), -1) @ p["W7"] + p["b7"], 0) * 0.5
    return (hidden @ p["W8"] + p["b8"]) * 0.5


def simple_scores(x: np.ndarray, p: Arrays) -> np.ndarray:
    x = pool(conv(x, p["W1"], p["b1"], 0))
    return np.maximum(x.reshape(len(x), -1) @ p["W2"] + p["b2"], 0) @ p["W3"] + p["b3"]


@pytest.mark.parametrize(
    ("name", "arrays", "image_shape", "scores"),
    [
        ("deepconvnet", deep_parameters(), (28, 28, 1), deep_scores),
        ("deepconvnet", deep_parameters(3, 64 * 4 * 3), (28, 20, 3), deep_scores),  # H, W, C all different
        ("simpleconvnet", SIMPLE, (28, 28, 1), simple_scores),
    ],
)
def test_a_pickle_of_the_source_gives_the_sources_scores(
    tmp_path: Path, name: str, arrays: Arrays, image_shape: tuple[int, ...], scores: Callable[..., np.ndarray]
) -> None:
    path = tmp_path / "params.pkl"
    path.write_bytes(pickle.dumps(arrays))
    model, specs = build_network(name, image_shape, 10, (10,))
    parameters = Parameters(specs, np.float64)
    wanted = places(model, parameters, image_shape)
    assert check(read_pickle(path), wanted, path) == []
    fill(parameters, read_pickle(path), wanted, path)
    x = np.random.default_rng(1).random((2, *image_shape))
    expected = scores(x.transpose(0, 3, 1, 2), arrays)
    np.testing.assert_allclose(
        model.forward(x, parameters.values, Context(training=False))[0], expected, rtol=0, atol=1e-10
    )


def read(tmp_path: Path, content: bytes) -> Arrays:
    path = tmp_path / "params.pkl"
    path.write_bytes(content)
    return read_pickle(path)


def by_numpy_1(content: bytes) -> bytes:
    """The same names as NumPy 1 has them. Protocols 4 and 5 write their lengths, and begin with that of all."""
    content = re.sub(rb"\x8c.(?=numpy\._core\.(\w+))", lambda found: b"\x8c%c" % (11 + len(found[1])), content)
    content = re.sub(rb"^(\x80.)\x95.{8}", rb"\1", content, flags=re.DOTALL)
    assert b"numpy._core." in content
    return content.replace(b"numpy._core.", b"numpy.core.")


@pytest.mark.parametrize("kind", [dict, OrderedDict])
@pytest.mark.parametrize("turn", [bytes, by_numpy_1])
@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_is_read_to_the_bit(tmp_path: Path, protocol: int, turn: Any, kind: type) -> None:
    W = np.random.default_rng(2).standard_normal((3, 2, 5, 5))
    arrays = {
        "W1": W,
        "b1": np.array([0.0, -0.0, 5e-324]),
        "W2": W.T,
        "W3": W[::2, :, 1:],
        "W4": W.transpose(2, 3, 0, 1),
    }
    arrays |= {"W5": W.astype("f4"), "W6": W.astype("f2"), "W7": W.astype(">f8"), "W8": W.T.astype(">f4"), "W9": W}
    found = read(tmp_path, turn(pickle.dumps(kind(arrays), protocol)))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
        assert found[name].tobytes() == array.tobytes()


class Call:
    """Pickles as a call of a function while it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


HOSTILE: dict[str, Callable[[str], object]] = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "eval": lambda canary: Call(eval, f"open({canary!r}, 'w').close()"),
    "numpy.memmap": lambda canary: Call(np.memmap, canary, "u1", "w+", 0, (9,)),
    "method": lambda canary: Call(Path.touch, Path(canary)),
    "partial": lambda canary: Call(functools.partial(os.mkdir, canary)),
    "inside": lambda canary: [{"a": (1, Call(os.mkdir, canary))}],
    "a shape": lambda canary: Call(np.ndarray, (Call(os.mkdir, canary),)),
    "a codec": lambda canary: Call(codecs.encode, "", "rot13"),
    "a codec's errors": lambda canary: Call(codecs.encode, "\u4e00", "latin1", "backslashreplace"),
    "objects": lambda canary: np.array([1, Call(os.mkdir, canary)], dtype=object),
    "a structured type": lambda canary: np.zeros(2, [("a", "f8"), ("b", "O")]),
}


@pytest.mark.parametrize("protocol", [0, 4])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, name: str, protocol: int) -> None:
    canary = tmp_path / "canary"
    content = pickle.dumps({"W1": np.ones(2), "b1": HOSTILE[name](str(canary))}, protocol)
    with contextlib.suppress(BadDataError):
        found = read(tmp_path, content)
        assert name == "a structured type" and found["b1"] is None  # no model takes that, and nothing was made of it
    assert not canary.exists()


@pytest.mark.parametrize("name", ["numpy dtype", "numpy ndarray", "_codecs encode", "collections OrderedDict"])
def test_a_pickle_changes_nothing_for_the_next_one(tmp_path: Path, name: str) -> None:
    """An instruction gives a thing attributes; here, the class that stands for a name."""
    class_ = b"c" + name.replace(" ", "\n").encode() + b"\n"
    attributes = b"N}(" + b"".join(text(word) + b"N" for word in (b"__new__", b"__init__", b"__call__")) + b"u\x86b"
    with pytest.raises(BadDataError):
        read(tmp_path, instructions(class_, attributes))
    for kind in (dict, OrderedDict):
        assert read(tmp_path, pickle.dumps(kind(W1=np.ones(2)), 2))["W1"].sum() == 2


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\nndarray.tofile\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        b"\x80\x02\x82\x01.",  # a name by its number in a registry
        b"Pa-persistent-name\n.",
        pickle.dumps({"W1": np.ones(2)}, 0).replace(b"Vlatin1\n", b"Vutf-8\n"),  # other bytes than were meant
        pickle.dumps({"W1": np.ones(2)}, 4).replace(b"K\x02\x85", b"K\x03\x85"),  # a shape of more numbers
        b"",
        *(pickle.dumps(deep_parameters())[:length] for length in (1, 100, 1000, 50_000, -1)),
    ],
    ids=lambda content: f"{content[:20]!r}-{len(content)}",
)
def test_a_file_that_is_no_whole_pickle_of_arrays_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BadDataError, match=r"params\.pkl is neither an .* of arrays: \w.*; nothing of it was run$"):
        read(tmp_path, content)


def instructions(*parts: bytes) -> bytes:
    """A program that ends with a dict of what the parts make."""
    return b"\x80\x04}\x8c\x02W1" + b"".join(parts) + b"s."


def text(content: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content


def array(name: bytes, numbers: bytes) -> bytes:
    """A name, and MIB bytes as an array of the bytes that the instructions `numbers` make."""
    shape = b"J" + struct.pack("<i", MIB // 8) + b"\x85"
    begun = b"cnumpy._core.multiarray\n_reconstruct\n(NNNtR"
    return text(name) + begun + b"(N" + shape + b"cnumpy\ndtype\n\x8c\x02f8NN\x87R\x89" + numbers + b"tb"


ENCODED = b"c_codecs\nencode\n" + text(bytes(MIB)) + text(b"latin1") + b"\x86R\x94"
AGAIN = b"c_codecs\nencode\nh\x00h\x01\x86R"
BOMBS = {
    "bytes made again and again": instructions(text(bytes(MIB)), b"\x94", text(b"latin1"), b"\x94", *[AGAIN] * 500),
    "arrays of the same bytes": b"\x80\x02}("
    + array(b"W", ENCODED)
    + b"".join(array(b"W%d" % i, b"h\x00") for i in range(100))
    + b"u.",
    "texts that one character makes wide": instructions(*[text(b"a" * 1000 + "\U0001f600".encode())] * 1000),
    "a place in the memo": b"\x80\x02Nr" + struct.pack("<I", 4 * MIB) + b".",
    "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 33) + b".",
    "many small things": b"}" * MIB + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_gets_no_memory_for_what_it_only_declares(tmp_path: Path, name: str) -> None:
    def refused() -> None:
        with pytest.raises(BadDataError, match=r"params\.pkl"):
            read(tmp_path, BOMBS[name])

    assert peak_memory(refused) < 5 * len(BOMBS[name]) + 4 * MIB


def test_a_large_pickle_takes_a_few_times_its_size(tmp_path: Path) -> None:
    for protocol in range(6):
        content = pickle.dumps({"W1": np.random.default_rng(0).standard_normal(MIB)}, protocol)
        most = 5.5 if protocol < 3 else 3.5  # older ones write bytes as text
        assert peak_memory(lambda content=content: read(tmp_path, content)) < most * len(content)  # type: ignore[misc]


READ_ALL = """
import pathlib, resource, sys
from distconv.errors import DistconvError
from distconv.run.pickled import read_pickle
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        read_pickle(path)
        print(path.name, "read")
    except DistconvError as error:
        print(path.name, type(error).__name__)
"""


def outcomes(folder: Path, contents: list[bytes]) -> list[str]:
    """What reading each of them in a fresh process comes to; a crash of that process fails here."""
    folder.mkdir()
    for i, content in enumerate(contents):
        (folder / f"{i:04d}.pkl").write_bytes(content)
    result = python("-c", READ_ALL, folder)
    assert result.returncode == 0, f"{result.stdout[-200:]} {result.stderr[-2000:]}"
    return [line.split()[1] for line in result.stdout.splitlines()]


def test_pickles_with_bytes_changed_are_read_or_refused(tmp_path: Path) -> None:
    draw = random.Random(0)
    contents = []
    for i in range(300):
        content = bytearray(pickle.dumps({"W1": np.ones((2, 3)), "b1": np.zeros(2, np.float32)}, i % 6))
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        contents.append(bytes(content))
    found = outcomes(tmp_path / "changed", contents)
    assert len(found) == 300 and set(found) == {"read", "BadDataError"}


# Each tuple holds the last one twice: 2^60 numbers, were they counted, as they are for a name.
TWICE = {
    "doubled": b"K\x00K\x00\x86" + b"2\x86" * 60,
    "recalled": b"\x8c\x01a\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60)),
    "recalled after no items": b"K\x00\x85(u\x94" + b"".join(b"h%ch%c\x86(u\x94" % (i, i) for i in range(60)),
    "recalled after no state": b"K\x00\x85Nb\x94" + b"".join(b"h%ch%c\x86Nb\x94" % (i, i) for i in range(60)),
    "recalled from one place": b"\x8c\x01aq\x00" + b"h\x00h\x00\x86q\x00" * 60,
}
CRASHES = {
    **{f"{how} as a name": b"\x80\x04}(" + tuples + b"K\x01u." for how, tuples in TWICE.items()},
    "a name of many tuples, each in the next": b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.",
    "a name of as many as are admitted": b"\x80\x02})" + b"\x85" * 9_990 + b"K\x01s.",
}


def test_no_pickle_crashes_the_interpreter_or_keeps_it_busy(tmp_path: Path) -> None:
    assert outcomes(tmp_path / "crash", list(CRASHES.values())) == ["BadDataError"] * len(CRASHES)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([np.ones(2)], "a list"),
        (np.ones(2), "a ndarray"),
        ({1: np.ones(2)}, "a int for a name"),
    ],
)
def test_a_pickle_of_another_kind_is_refused(tmp_path: Path, content: object, words: str) -> None:
    with pytest.raises(BadDataError, match=f"params.pkl.*{words}"):
        read(tmp_path, pickle.dumps(content))


def changed(**parts: object) -> Arrays:
    return {key: value for key, value in {**deep_parameters(), **parts}.items() if value is not None}


def taken(tmp_path: Path, arrays: Arrays) -> tuple[Parameters, list[str]]:
    """deepconvnet filled with what a pickle has, and the names of what was passed over."""
    path = tmp_path / "params.pkl"
    path.write_bytes(pickle.dumps(arrays))
    model, specs = build_network("deepconvnet", (28, 28, 1), 10, (10,))
    parameters = Parameters(specs)
    wanted = places(model, parameters, (28, 28, 1))
    found = read_pickle(path)
    passed_over = check(found, wanted, path)
    fill(parameters, found, wanted, path)
    return parameters, passed_over


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (changed(W3=None), r"W3 is missing, .*\(32, 16, 3, 3\); the file holds 'W1', 'b1', .*--model"),
        (changed(W7=np.ones((50, 1024))), r"W7 is \(50, 1024\), .*\(1024, 50\).*--model.*export --help"),
        (SIMPLE, r"W1 is \(30, 1, 5, 5\).*--model"),
        (changed(b1=np.full(16, 1e39)), "b1 that are too large for float32"),
        (changed(b1=np.full(16, np.nan)), "'b1' holds NaN"),
        *((changed(W8=np.ones((50, 10), kind)), "'W8' is no array of floats") for kind in (complex, int, np.uint8)),
        (changed(b1=np.array([1.0, None])), "'b1' is no array of floats"),
        (changed(b1="text"), "'b1' is no array of floats"),
    ],
)
def test_arrays_that_are_not_the_models_are_refused_by_key(tmp_path: Path, arrays: Arrays, words: str) -> None:
    with pytest.raises((MismatchError, BadDataError), match=f"params.pkl.*{words}"):
        taken(tmp_path, arrays)


def test_what_no_layer_has_is_passed_over_by_name(tmp_path: Path) -> None:
    more: Arrays = {
        "epoch": 3,
        "note": "trained on Monday",
        "W9": np.ones((10, 10)),
        "bad": np.full(9, np.nan),
        "counts": np.arange(3),
        "optimizer_state": {"m": {"W1": np.ones(2)}, "lr": 0.1, "steps": [1, 2]},
    }
    without, nothing = taken(tmp_path, changed())
    with_them, names = taken(tmp_path, changed(**more))
    assert nothing == [] and names == list(more)
    np.testing.assert_array_equal(with_them.vector, without.vector)
