"""The flags of distconv.launch, and what it makes of those of distconv.train."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tests import jobs
from tests.stand_in import lines, mpirun, starts, supervise


@pytest.mark.parametrize(("asked", "then"), [("auto", []), ("never", ["--resume", "auto"])])
def test_a_restart_goes_on_whatever_the_first_start_was_told(out: Path, asked: str, then: list[str]) -> None:
    supervise(out, "killed() | saves(4); killed() | finishes()", train=("--resume", asked)).finish(20)
    common = f"-n 2 {sys.executable} -m distconv.train --out {out} --resume {asked} --out {out}".split()
    expected = [common, [*common, *then], [*common, "--resume", "auto"]]
    assert [start["arguments"] for start in lines(out / "starts")] == expected


def test_a_command_that_cannot_be_started_is_one_sentence(out: Path) -> None:
    broken = out.parent / "mpirun"
    broken.write_text("no program")
    broken.chmod(0o755)
    result = jobs.run(0, "-m", "distconv.launch", "-n", "2", "--mpirun", broken, "--", "--out", out)
    assert result.returncode == 1 and result.stderr == f"distconv: {broken} cannot be started: Exec format error\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--", "--epochs", "3"], "-n/--ranks"),
        (["-n", "2", "--restarts", "-1"], "--restarts -1"),
        (["-n", "2", "--epochs", "3"], "the flags of distconv.train stand behind --"),
        (["-n", "2", "--", "--bach-size", "3"], "did you mean --batch-size?"),
        (["-n", "2", "--mpirun", "no-such-mpirun"], "there is no such command"),
    ],
)
def test_a_wrong_flag_of_either_is_one_sentence_and_no_start(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = jobs.run(0, "-m", "distconv.launch", *arguments, PLAY="sys.exit(0)")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("distconv: ") and said in line


def test_what_train_only_prints_needs_no_ranks() -> None:
    for flag in ("--help", "--print-config"):
        arguments = ("--epochs", "7", flag)
        result = jobs.run(0, "-m", "distconv.launch", "-n", "2", "--", *arguments)
        assert result.returncode == 0
        assert result.stdout == jobs.run(0, "-m", "distconv.train", *arguments).stdout


def test_it_is_not_started_by_an_mpirun() -> None:
    result = jobs.run(2, "-m", "distconv.launch", "-n", "2")
    assert result.returncode == 1 and "run it without mpirun" in result.stderr


def test_without_a_folder_all_starts_share_a_new_one(tmp_path: Path) -> None:
    play = "note('metrics.jsonl', event='step', step=1); killed() | finishes()"
    starter = shlex.quote(mpirun(tmp_path))
    script = f"cd {tmp_path}; exec {sys.executable} -m distconv.launch -n 2 --mpirun {starter}"
    result = jobs.run(None, "bash", "-c", script, PLAY=play, PYTHONPATH=str(jobs.ROOT))
    assert result.returncode == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert starts(folder) == 2
