"""Ranks that run other code than rank 0 are named before they train."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distconv.run import same_code
from tests import jobs
from tests.test_failures import QUICK, assert_one_sentence

RUN = "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); runpy.run_module(sys.argv.pop(1), alter_sys=True)"
RUN = RUN.replace("alter_sys", "run_name='__main__', alter_sys")
MODEL = """
from distconv.nn.layers import Affine, Chain
def network(classes): return Chain(Affine(classes, deviation=0.01))
"""


def on_two(first: Path, second: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A job of two ranks, each of which finds its modules first in a folder of its own."""
    ranks = [[sys.executable, "-c", RUN, folder, *arguments] for folder in (first, second)]
    return jobs.run(None, jobs.MPIRUN, "-n", "1", *ranks[0], ":", "-n", "1", *ranks[1])


def two_folders(folder: Path, fill: Callable[[Path], Any]) -> tuple[Path, Path]:
    for name in ("first", "second"):
        (folder / name).mkdir()
        fill(folder / name)
    return folder / "first", folder / "second"


@pytest.mark.slow
def test_a_rank_with_another_distconv_of_the_same_layout_is_named(tmp_path: Path) -> None:
    first, second = two_folders(tmp_path, lambda to: shutil.copytree(jobs.ROOT / "distconv", to / "distconv"))
    layers = second / "distconv" / "nn" / "networks.py"
    layers.write_text(layers.read_text().replace("Dropout(0.5)", "Dropout(0.4)"))
    result = on_two(first, second, "distconv.train", *QUICK, "--out", tmp_path / "run")
    assert_one_sentence(result, 78, "the code of distconv: rank 1 differs from rank 0")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", pytest.param("evaluate", marks=pytest.mark.slow)])
def test_a_rank_with_another_model_of_the_same_layout_is_named(tmp_path: Path, command: str) -> None:
    first, second = two_folders(tmp_path, lambda to: (to / "mine.py").write_text(MODEL))
    train = ("distconv.train", *QUICK, "--model", "mine:network", "--out", tmp_path / "run")
    if command == "evaluate":
        assert on_two(first, second, *train).returncode == 0
        train = ("distconv.evaluate", next((tmp_path / "run" / "checkpoints").glob("*")))
    (second / "mine.py").write_text(MODEL.replace("0.01", "0.02"))
    assert_one_sentence(on_two(first, second, *train), 78, "the code of mine:network: rank 1 differs from rank 0")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's package of two modules, of which one is loaded by the other, and a third that lies beside it."""
    (tmp_path / "own").mkdir()
    for name, code in (("__init__", ""), ("nets", "import own.blocks"), ("blocks", ""), ("unused", "")):
        (tmp_path / "own" / f"{name}.py").write_text(code)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "alone.py").write_text("import beside")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("own", "own.nets", "own.blocks", "alone", "beside"):
        sys.modules.pop(name, None)


def test_what_a_users_module_has_loaded_from_its_package_or_beside_it_counts(package: Path) -> None:
    assert same_code.own_code("own.nets") == {}  # not loaded
    __import__("own.nets")
    before = same_code.own_code("own.nets")
    assert before.keys() == {"own", "own.nets", "own.blocks"}
    (package / "own" / "blocks.py").write_text("changed = True")
    after = same_code.own_code("own.nets")
    assert [name for name in before if before[name] != after[name]] == ["own.blocks"]
    __import__("alone")
    assert same_code.own_code("alone").keys() == {"alone", "beside"}
