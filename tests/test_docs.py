"""The pages for people: their commands run, their links lead somewhere, their tables are complete.

A command is an indented line that begins with the name of a program. Every command of README.md and docs/*.md is run,
page by page and in order, as it stands or made smaller by SMALLER, unless EXEMPT has a reason why not. Its flags must
exist in any case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from distconv import errors
from distconv.__main__ import COMMANDS, main
from distconv.config import Config, flag
from tests import jobs
from tests.test_pickled import deep_parameters

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
HISTORY = ROOT / "docs" / "log.md"  # of what was once so
PAGES = [README, *sorted(path for path in (ROOT / "docs").glob("*.md") if path != HISTORY)]
PROGRAMS = (
    "python3 python mpirun distconv pip timeout ls tail cd docker module salloc srun bash launch/box.py .".split()  # noqa: SIM905
)
WORDS = r"(?:distconv[. ])([a-z]+)(?: (step|exchange|scaling|predict|accuracy)\b)?"  # of a command, and of a benchmark

EXEMPT = (
    (r"\bpip install|python3 -m venv|^\. \.venv", "installs, as .ci/run does before all tests"),
    (r"python -m pytest", "is what runs this"),
    (r"--device cuda|tf32|on_gpu\.sh", "needs a GPU; tests/test_gpu.py"),
    (r"^docker ", "needs Docker"),
    (r"salloc|srun|module load|^cd distconv", "needs a batch system; tests/test_slurm.py"),
    (r"box\.py", "needs root; tests/test_box.py"),
    (r"data fetch|cifar10", "needs a network; tests/test_mnist.py, tests/test_cifar.py"),
    (r"--against torch", "needs PyTorch; tests/test_bench_step.py"),
    (r"table\.py|to_wandb\.py|to_mlflow\.py", "needs what distconv does without; run beside stand-ins below"),
)  # fmt: skip
VERBATIM = ("tutorial.md",)  # whose commands are to be copied, and are small by themselves
SMALLER = (  # a pattern and what stands for it, one after the other
    (r"--data mnist\b", "--data digits"),  # MNIST may not be at hand
    (r"show mnist", "show digits"),
    (r"lr0?\.?( ?)0\.0\d+", r"lr\g<1>0.001"),  # one rate for three
    (r"(mpirun|launch) -n \d", r"\1 -n 2"),
    (r"--ensemble \d", "--ensemble 2"),
    (r"--epochs \d+", "--epochs 1"),
    (r"--seeds \d+", "--seeds 1"),
    (r" --seed \d+", ""),
    (r"(distconv[. ]train(?!.*(--epochs|--describe|--print-config)).*)", r"\1 --epochs 1"),
    (r"(distconv[. ](train|launch)(?!.*--data ).*)", r"\1 --data digits"),
    (r"(distconv[. ]launch.*)", r"\1 --epochs 1"),
    (r"(distconv[. ]bench accuracy.*)", r"\1 --epochs 1 --data digits"),
    (r"(distconv[. ]bench scaling).*", r"\1 --ranks 1 --steps 3 --png scaling.png --json > one.json"),
    (r"(distconv[. ]bench exchange).*", r"\1 --elements 123552 --seconds 2"),
    (r"(distconv[. ]bench step)( --model mine:network)?.*", r"\1\2 --batch-size 100"),
    (r"(distconv[. ]prove)(?: --model resnet20)?(( --model \S+)?( --data \S+)?).*", r"\1\2 --ranks 2 --wires float16"),
)


def short(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_lines(page: Path) -> Iterator[str]:
    """The indented lines of a page outside of fences; of a block that begins with $, only what follows a $."""
    fenced, block = False, ""
    for line in page.read_text().splitlines():
        fenced ^= line.startswith("```")
        if fenced or not line.startswith("    "):
            block = ""
            continue
        block = block or line.strip()
        if block.startswith("$ ") and not line.strip().startswith("$ "):
            continue
        yield line.strip().removeprefix("$ ")


def commands(page: Path) -> list[str]:
    """The commands of a page in order, without what is said about them."""
    lines = (re.sub(r"\s{2,}#.*", "", line) for line in code_lines(page))
    return [line for line in lines if line.split(" ")[0] in PROGRAMS and "distconv 0." not in line]


def mentioned_commands(page: Path) -> list[str]:
    """These, and those within a sentence or a table, where a flag may be wrong too."""
    within = re.findall(r"`([^`\n]+)`", page.read_text())
    return commands(page) + [text for text in within if re.search(rf"^(python -m|mpirun .*|distconv\b).*{WORDS}", text)]


def reason_not_to_run(command: str) -> str:
    return next((why for pattern, why in EXEMPT if re.search(pattern, command)), "")


def made_smaller(command: str) -> str:
    return functools.reduce(lambda text, rule: re.sub(*rule, text), SMALLER, command)


def listings(page: Path) -> dict[str, str]:
    """The files that a page asks to save, by name."""
    return dict(re.findall(r"Save this\s+as\s+`([\w.]+)`:\n\n```python\n(.*?)```", page.read_text(), re.DOTALL))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: a file of the source's, and some photos of two things."""
    folder = tmp_path_factory.mktemp("desk")
    with (folder / "params.pkl").open("wb") as file:
        pickle.dump(deep_parameters(), file)
    for name in ("cats", "dogs"):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(12):
            picture = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
            matplotlib.image.imsave(folder / "photos" / name / f"{number}.png", picture)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=short)
def test_the_commands_of_a_page_run_in_order(page: Path, desk: Path) -> None:
    """What an earlier page has run is not run again: its files are there."""
    for name, source in listings(page).items():
        (desk / name).write_text(source)
    done = desk / "commands"
    environment = {
        **jobs.ENVIRONMENT,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for command in commands(page):
        small = command if page.name in VERBATIM and "mnist" not in command else made_smaller(command)
        small = re.sub(r"(?<![\w./-])distconv (?=[a-z])", "python -m distconv.", small)  # of this checkout
        if reason_not_to_run(command) or small in (done.read_text().splitlines() if done.exists() else ()):
            continue
        result = subprocess.run(
            ["bash", "-c", small], cwd=desk, env=environment, capture_output=True, text=True, timeout=300
        )
        stopped = result.returncode == errors.STOPPED and command.startswith("timeout")
        assert result.returncode == 0 or stopped, f"{page.name}: {command}\n{small}\n{result.stdout}{result.stderr}"
        with done.open("a") as file:
            file.write(f"{small}\n")


@functools.cache
def flags_of(*words: str) -> set[str]:
    """The flags that a command's help lists."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return set(re.findall(r"(?<!\S)\[?(--?[a-z][\w-]*)", out.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_the_flags_of_all_commands_exist(page: Path) -> None:
    for command in mentioned_commands(page):
        found = re.search(WORDS, command)
        if not found:
            continue
        assert found[1] in COMMANDS, command
        own, _, behind = command[found.end() :].partition(" -- ")
        words = [word for word in found.groups() if word]
        for text, known in ((own, flags_of(*words)), (behind, flags_of("train"))):
            given = set(re.findall(r"(?<!\S)(--[a-z][\w-]*)", re.sub(r"\"[^\"]*\"|'[^']*'", "", text)))
            assert given <= known, command


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, HISTORY, ROOT / "CONTRIBUTING.md"], ids=short)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE)), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=short)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """By their path within the checkout or the package; by a room's list, the names alone."""
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|cu|sh|sbatch|yaml|toml|def))`", page.read_text()):
        if not name.startswith(("runs/", "OUT/")):
            places = (ROOT / name, ROOT / "distconv" / name)
            assert any(place.exists() for place in places), f"{page.name} names {name}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"({page.name})" not in index and page.name != "README.md"] == []


def test_the_readme_fits_four_screens_and_keeps_its_two_lines() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    assert [line for line in text.splitlines() if len(line) > 120] == []
    screen = "\n".join(text.splitlines()[:50])
    for line in (
        "python3 -m venv .venv && {} && pip install -e '.[mpich]' && mpirun -n 4 python -m distconv.train",
        "{} && pip install -e '.[mpich,test]' && python -m pytest",
    ):
        assert "\n\n    " + line.format(". .venv/bin/activate") + "\n\n" in screen


def test_every_setting_is_explained_on_some_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    names = [flag(field.name) for field in dataclasses.fields(Config)] + ["--recipe", "--config", "--print-config"]
    assert [name for name in names if not re.search(rf"{name}(?![\w-])", text)] == []


def test_every_exit_code_is_explained() -> None:
    rows = re.findall(r"^\| ([\d, ]+)", (ROOT / "docs" / "failures.md").read_text(), re.MULTILINE)
    explained = {int(code) for row in rows for code in re.findall(r"\d+", row)}
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.DistconvError)
    ]
    assert {0, errors.STOPPED, errors.HUNG, *(kind.exit_code for kind in kinds)} <= explained


def documented_keys() -> dict[str, set[str]]:
    """The keys in the tables of docs/metrics.md, by the events in the heading above them."""
    keys: dict[str, set[str]] = {}
    for section in (ROOT / "docs" / "metrics.md").read_text().split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
            for event in heading.split(" and "):
                keys.setdefault(event, set()).update(re.findall(r"`(\w+)`", row))
    return keys


def test_every_key_of_a_run_is_explained_and_nothing_else(tmp_path: Path) -> None:
    """A run with all that adds keys."""
    out = tmp_path / "run"
    command = ["-m", "distconv.train", "--data", "digits", "--epochs", "1", "--ema", "0.9", "--validation", "100"]
    result = jobs.run(2, *command, "--out", out)
    assert result.returncode == 0, result.stderr
    found: dict[str, set[str]] = {}
    for record in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        found.setdefault(record["event"], set()).update(record)
    explained = documented_keys()
    for event, keys in found.items():
        assert keys - {"event", "time"} <= explained[event], event
        assert explained[event] - keys <= {"event", "time"}, event
    assert set(found) | {"stop"} == set(explained)


class StandIn(ModuleType):
    """A service that keeps what it is told: each call by its name, with its arguments."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.told: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *values, **named: self.told.append((name, values, named)) or contextlib.nullcontext(self)


def test_the_readers_of_metrics_give_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"event": "start", "time": 0.0, "ranks": 2}]
    records += [{"event": "step", "step": step, "train_loss": 1.0 / step, "skipped": False} for step in (1, 2)]
    records += [
        {"event": "epoch", "step": 2, "epoch": 1, "test_accuracy": 0.5, "noise_scale": None, "parameters_sha256": "f"}
    ]
    records += [{"event": "final", "step": 2, "test_accuracy": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(tmp_path)
    wandb, mlflow = StandIn("wandb"), StandIn("mlflow")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr(sys, "argv", ["reader", str(tmp_path)])
    for name, source in listings(ROOT / "docs" / "metrics.md").items():
        if name != "table.py" or importlib.util.find_spec("pandas"):
            exec(compile(source, name, "exec"), {"__name__": "__main__"})
    assert wandb.told[0][2]["config"] == records[0]
    logged = [(values[0], named["step"]) for name, values, named in wandb.told if name == "log"]
    assert ({"epoch/step": 2, "epoch/epoch": 1, "epoch/test_accuracy": 0.5}, 2) in logged and len(logged) == 4
    metrics = [values[0]["test_accuracy"] for name, values, _ in mlflow.told if name == "log_metrics"]
    assert metrics == [0.5, 0.75]
    assert (tmp_path / "runs.png").stat().st_size > 1000


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_the_python_of_a_page_can_be_compiled(page: Path) -> None:
    for source in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(source, page.name, "exec")


def test_programs_are_at_hand() -> None:
    assert [name for name in ("bash", "timeout", "ls", "tail") if not shutil.which(name)] == []
