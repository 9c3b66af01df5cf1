"""One command for all: each sub-command is the module of its name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distconv import __version__
from distconv.__main__ import COMMANDS
from tests import jobs

CONSOLE = str(Path(sys.executable).parent / "distconv")


@pytest.mark.parametrize("start", [[CONSOLE], [sys.executable, "-m", "distconv"]], ids=["console", "module"])
def test_a_sub_command_does_what_its_module_does(start: list[str]) -> None:
    arguments = ("--epochs", "3", "--print-config")
    result = jobs.run(None, *start, "train", *arguments)
    assert result.returncode == 0 and "epochs = 3" in result.stdout
    assert result.stdout == jobs.run(0, "-m", "distconv.train", *arguments).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_one_has_its_help(command: str) -> None:
    result = jobs.run(None, CONSOLE, command, "--help")
    assert result.returncode == 0 and "usage: " in result.stdout and f"distconv.{command}" in result.stdout


def test_without_a_command_all_are_listed_by_one_rank() -> None:
    result = jobs.run(None, jobs.MPIRUN, "-n", "2", CONSOLE)
    assert result.returncode == 0 and result.stdout.count("usage: ") == 1
    assert all(f"  {command} " in result.stdout for command in COMMANDS)
    assert jobs.run(None, CONSOLE, "--version").stdout == f"distconv {__version__}\n"


def test_a_wrong_command_is_one_sentence_with_the_one_that_was_meant() -> None:
    result = jobs.run(None, jobs.MPIRUN, "-n", "2", CONSOLE, "tarin", "--epochs", "3")
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("distconv: ")]
    assert "did you mean train?" in line
