"""A user's own model or data set that cannot work: one sentence says why; what the user's own code raises is shown."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distconv.data import load
from distconv.errors import BadDataError, UsageError
from distconv.nn.checked import checked
from distconv.nn.fusion import fused
from distconv.nn.layers import Context
from distconv.nn.networks import build_network
from distconv.nn.parameters import Parameters
from distconv.tasks.classify import Classification
from tests import jobs
from tests.test_failures import QUICK, assert_one_sentence

IMPORTS = """
import numpy as np
from distconv.data.dataset import Dataset
from distconv.nn.blocks import Residual
from distconv.nn.layers import Affine, Chain, Conv, Dropout, MaxPool
from distconv.nn.normalization import ConvNorm
from distconv.nn.parameters import Spec

class Bad:
    def __init__(self, shapes=None, forward=None, backward=None):
        self.found = shapes, forward, backward
    def shapes(self, shape):
        return self.found[0](shape) if self.found[0] else (shape, {})
    def forward(self, x, params, context):
        if self.found[1]:
            return self.found[1](x)
        return x, self.found[2] or (lambda dy, grads, wants_dx: dy)

def shapes(function): return Chain(Bad(function), Affine(10))
def forward(function): return Chain(Affine(20), Bad(forward=function), Affine(10))
"""


def train(folder: Path, code: str, *flags: str, ranks: int = 2):  # type: ignore[no-untyped-def]
    """A run of a module that holds this code, with its own model or data set named by flags."""
    (folder / "of_a_user.py").write_text(IMPORTS + code)
    arguments = ("-m", "distconv.train", *QUICK, *flags, "--out", folder / "run")
    return jobs.run(ranks, *arguments, PYTHONPATH=str(folder))


BACKWARD = "Chain(Affine(20), Bad(None, None, lambda dy, grads, wants: {}), Affine(10))"
FUSED = "Chain(ConvNorm(16), Residual(Chain(ConvNorm(16), ConvNorm(16, relu=False)), {}), Affine(10))"
BESIDE = "Chain(Affine(20), Residual(Affine(20), {}), Affine(10))"
MODELS = {
    "a list": ("[Affine(classes)]", "returned a list, but a layer"),
    "a class": ("Chain", "returned the class Chain, but a layer"),
    "no parameters": ("Bad(lambda shape: ((classes,), {}))", "has no parameters"),
    "a chain of a list": ("Chain([Affine(classes)])", "argument 1 is a list"),
    "0 filters": ("Chain(Conv(0), Affine(classes))", "filters must be a whole number"),
    "a stride of text": ("Chain(MaxPool(stride='2'), Affine(classes))", "stride must be"),
    "half an output": ("Chain(Affine(0.5), Affine(classes))", "outputs must be a whole"),
    "a ratio of text": ("Chain(Dropout('x'), Affine(classes))", "the ratio must lie in"),
    "a deviation of text": ("Chain(Affine(classes, deviation='x'))", "W has the deviation 'x'"),
    "no shapes": ("shapes(lambda shape: None)", "Bad.shapes gave None"),
    "a negative shape": ("shapes(lambda shape: ((-1,), {}))", "Bad.shapes gave ((-1,)"),
    "specs in a list": ("shapes(lambda shape: (shape, [3]))", "its parameters are a list"),
    "a negative spec": ("shapes(lambda s: (s, {'W': Spec((-3,))}))", "W has the shape (-3,)"),
    "a spec of a number": ("shapes(lambda s: (s, {'W': Spec(3)}))", "W has the shape 3"),
    "a dotted name": ("shapes(lambda s: (s, {'a.b': Spec((3,))}))", "is named 'a.b'"),
    "too large": ("shapes(lambda s: (s, {'W': Spec((10**15,))}))", "has 1,000,000,000,007,850 parameters"),
    "y alone": ("forward(lambda x: x)", "Bad.forward gave float32 of shape (2, 20), but (y,"),
    "no backward": ("forward(lambda x: (x, None))", "Bad.forward gave 2 values"),
    "another y": ("forward(lambda x: (x[:, :9], id))", "shape (2, 9), but floats of shape (2, 20)"),
    "integers": ("forward(lambda x: (x.astype(int), id))", "int64 of shape (2, 20), but floats"),
    "half precision": ("forward(lambda x: (x.astype('e'), id))", "float16 of shape (2, 20), but floats"),
    "x changed": ("forward(lambda x: (np.add(x, 2, out=x), id))", "Bad.forward changed its input"),
    "no dx": (BACKWARD.format("None"), "the backward pass of Bad gave a NoneType"),
    "another y beside": (
        BESIDE.format("Bad(None, lambda x: (x[:, :9], id))"),
        "Bad.forward gave float32 of shape (2, 9)",
    ),
    "another dx beside": (
        BESIDE.format("Chain(Bad(None, None, lambda dy, grads, wants: dy[:, :1]))"),
        "the backward pass of Bad gave float32 of shape (2, 1)",
    ),
    "another y beside what is fused": (
        FUSED.format("Bad(None, lambda x: (x[:, :1], id))"),
        "Bad.forward gave float32 of shape (2, 1, 28, 16)",
    ),
    "another dx beside what is fused": (
        FUSED.format("Bad(None, None, lambda dy, grads, wants: dy[:, :1])"),
        "the backward pass of Bad gave float32 of shape (2, 1, 28, 16)",
    ),
    "another dx": (BACKWARD.format("dy[:, :3]"), "the backward pass of Bad gave float32 of shape (2, 3)"),
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes the module of_a_user, which the next test does not find."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    importlib.invalidate_caches()
    yield lambda code: (tmp_path / "of_a_user.py").write_text(IMPORTS + code)
    sys.modules.pop("of_a_user", None)


def try_model(name: str) -> None:
    """What a run does with a model before its first step."""
    model, specs = build_network(name, (28, 28, 1), 10, (10,))
    context = Context(training=True, samples=np.arange(2))
    batch, parameters = (np.zeros((2, 28, 28, 1), np.float32), np.zeros(2, np.uint8)), Parameters(specs)
    Classification().gradient(checked(fused(model)), parameters.values, parameters.grads, batch, context)


@pytest.mark.parametrize("case", [case for case in MODELS if case != "too large"])
def test_a_model_that_cannot_work_is_a_usage_error_that_says_why(module: Any, case: str) -> None:
    expression, words = MODELS[case]
    module(f"def network(classes): return {expression}")
    with pytest.raises(UsageError) as caught:
        try_model("of_a_user:network")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_takes_no_number_of_classes_is_a_usage_error(module: Any) -> None:
    module("def network(): return Chain(Affine(10))")
    with pytest.raises(UsageError, match="of_a_user:network is called with 1 argument, which it does not take"):
        try_model("of_a_user:network")


@pytest.mark.parametrize("case", ["too large", "another y"])
def test_on_all_ranks_it_is_one_sentence_and_leaves_no_folder(tmp_path: Path, case: str) -> None:
    expression, words = MODELS[case]
    assert_one_sentence(
        train(tmp_path, f"def network(classes): return {expression}", "--model", "of_a_user:network"), 2, words
    )
    assert not (tmp_path / "run").exists()


def test_a_model_that_fails_in_evaluation_alone_is_known_before_the_first_step(tmp_path: Path) -> None:
    code = """
class Eager(Bad):
    def forward(self, x, params, context):
        return (x if context.training else x[:, :9]), lambda dy, grads, wants_dx: dy
def network(classes): return Chain(Affine(20), Eager(), Affine(10))
"""
    result = train(tmp_path, code, "--model", "of_a_user:network")
    assert_one_sentence(result, 2, "Eager.forward gave float32 of shape (1, 9), but floats of shape (1, 20)")
    assert not (tmp_path / "run").exists()


def test_a_model_that_works_passes_all_looks(module: Any) -> None:
    names = "{'W-1': Spec((), np.float32(0.5)), 'inner': {'0': Spec((np.int64(3),))}, 'more': {}}"
    module(f"def network(classes): return Chain(Conv(np.int64(2)), Dropout(1), shapes(lambda s: (s, {names})))")
    try_model("of_a_user:network")


DATA = """
labels, images = np.arange(60, dtype=np.uint8) % 10, np.zeros((60, 8, 8), np.uint8)
def data(*, images=images, labels=labels, **more): return Dataset("mine", images, labels, images, labels, **more)
"""
SETS = {
    "labels in a list": ("def mine(): return data(labels=labels.tolist())", "labels are a list"),
    "a mask": ("def mine(): return data(images=np.ma.masked_less(images, 9))", "images are a MaskedArray"),
    "no pixels": ("def mine(): return data(images=images[:, :0])", "60 images of shape (0, 8)"),
    "an argument": ("def mine(folder): return data()", "called with 0 arguments, which it does not take"),
}


@pytest.mark.parametrize("case", SETS)
def test_a_data_set_that_cannot_work_is_an_error_that_says_why(module: Any, case: str) -> None:
    code, words = SETS[case]
    module(DATA + code)
    with pytest.raises((BadDataError, UsageError), match=re.escape(words)):
        load("of_a_user:mine")


def test_on_all_ranks_that_is_one_sentence(tmp_path: Path) -> None:
    code, words = SETS["a mask"]
    assert_one_sentence(train(tmp_path, DATA + code, "--data", "of_a_user:mine"), 65, words)


@pytest.mark.slow
def test_arrays_that_are_not_contiguous_or_not_writable_train(tmp_path: Path) -> None:
    code = (
        "def mine(): images.flags.writeable = False; return data(images=images.T.reshape(8, 8, 60).transpose(2, 1, 0))"
    )
    code += "\ndef network(classes): return Chain(Conv(4), Affine(classes))"
    result = train(tmp_path, DATA + code, "--data", "of_a_user:mine", "--model", "of_a_user:network")
    assert result.returncode == 0, result.stderr


RAISING = {
    "the module": ("raise ZeroDivisionError", "--model", "of_a_user:network"),
    "its forward pass": ("def network(classes): return forward(lambda x: 1 / 0)", "--model", "of_a_user:network"),
}


@pytest.mark.parametrize("case", RAISING)
def test_what_a_users_code_raises_on_all_ranks_is_told_once_with_its_line(tmp_path: Path, case: str) -> None:
    code, *flags = RAISING[case]
    result = train(tmp_path, code, *flags, ranks=3)
    assert result.returncode == 1
    assert result.stderr.count("Traceback (most recent call last)") == 1, result.stderr
    assert result.stderr.count("failed and ends the job: ZeroDivisionError") == 1, result.stderr
    assert "of_a_user.py" in result.stderr


SLOW_TO_TELL = """
import time

class Slow(Exception):
    def __str__(self):
        time.sleep(0.2)
        return "told"

calls = 0

def fail(*args):
    global calls
    calls += 1
    if calls > {after}:
        raise Slow
    return args[0]

def network(classes):
    return Chain(Affine(20), Bad(None, None, fail), Affine(classes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 10], ids=["before there is a folder", "at a step"])
def test_the_first_of_ranks_that_fail_alike_is_heard_before_another_ends_the_job(tmp_path: Path, after: int) -> None:
    code = SLOW_TO_TELL.format(after=after)
    result = train(tmp_path, code, "--model", "of_a_user:network", ranks=3)
    assert result.stderr.count("failed and ends the job: Slow: told") == 1, result.stderr
    assert (tmp_path / "run/errors").exists() == bool(after)


PROCESSES = """
import multiprocessing, os, signal, sys, time
from distconv.data.digits import load

ready, working = os.pipe()

def work():
    os.write(working, b"1")
    time.sleep(100)

def start(**flags):
    process = multiprocessing.get_context("fork").Process(target=work, **flags)
    process.start()
    return process

def data():
    with multiprocessing.Pool(2) as pool:  # which ends its processes by SIGTERM
        assert pool.map(abs, [-1, 2]) == [1, 2]
    for _ in range(9):  # at once, before or after it has begun
        process = start()
        process.terminate()
        process.join()
        assert process.exitcode == -signal.SIGTERM
    global ready, working
    ready, working = os.pipe()
    process = start()
    os.read(ready, 1)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 1  # KeyboardInterrupt
    for leave, code in ((lambda: sys.exit(0), 0), (lambda: sys.exit(3), 3), (lambda: 1 / 0, 1)):
        if os.fork() == 0:
            leave()
        assert os.waitstatus_to_exitcode(os.wait()[1]) == code
    start(daemon=True)
    multiprocessing.Pool(2).map(abs, range(9))  # is left
    return load()
"""


@pytest.mark.slow
def test_processes_of_a_users_code_are_no_ranks(tmp_path: Path) -> None:
    """They hear no requests to stop, but what signals usually mean; and their end is not that of the job."""
    result = train(tmp_path, PROCESSES, "--data", "of_a_user:data")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run/DONE").exists() and "stopped" not in result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "ranks"), [("threading.Thread", 0), ("multiprocessing.get_context('fork').Process", 2)]
)
def test_what_a_users_code_leaves_behind_does_not_keep_a_finished_run(tmp_path: Path, what: str, ranks: int) -> None:
    code = f"""
import multiprocessing, os, threading, time
from distconv.comm import leave
from distconv.process.launched import launcher_rank
from distconv.data.digits import load
leave.LEAST = 4.0  # seconds; a minute, else

def data():
    if launcher_rank() == {ranks // 2}:
        {what}(target=time.sleep, args=(1000,), name="prefetch").start()
    return load()
"""
    result = train(tmp_path, code, "--data", "of_a_user:data", ranks=ranks)
    assert result.returncode == 0 and (tmp_path / "run/DONE").exists(), result.stdout + result.stderr
    assert result.stderr.count("does not end, and is ended now") == 1 and "prefetch" in result.stderr
