"""Odd environments: whatever shell, locale, limits and home are, a command works or says one sentence."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distconv.kernels.compiled import CACHE
from tests import jobs
from tests.test_failures import QUICK, assert_one_sentence

Result = subprocess.CompletedProcess[str]
PREDICT = (
    "bench predict --step-seconds-per-image 0.0008 --parameters 123552 --batch-size 100 --latency 50us --bandwidth"
)
PREDICT += " 1gbit --weak"


def shell(script: str, *command: str | Path | bytes, **environment: str) -> Result:
    """Run a script of bash in which "$@" is `python -m distconv command...`."""
    words = [os.fsdecode(word) for word in command]
    return jobs.run(
        None,
        "bash",
        "-c",
        script,
        "bash",
        sys.executable,
        "-m",
        "distconv",
        *words,
        **{"PYTHONUNBUFFERED": "", **environment},
    )


def train(out: Path) -> tuple[str | Path, ...]:
    return "train", *QUICK, "--out", out


@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [("--help", ""), ("--version", "1"), ("train --print-config", ""), (PREDICT, "1"), ("doctor", "")],
)
def test_output_that_does_not_arrive_fails_with_a_sentence(command: str, unbuffered: str) -> None:
    result = shell('exec "$@" >/dev/full', *command.split(), PYTHONUNBUFFERED=unbuffered)
    assert_one_sentence(result, 74, "standard output cannot be written: No space left on device")


def test_a_run_whose_output_does_not_arrive_fails_with_a_sentence(tmp_path: Path) -> None:
    result = shell('exec "$@" >/dev/full', *train(tmp_path / "run"))
    assert_one_sentence(result, 74, "standard output cannot be written")


def test_a_reader_that_leaves_is_no_news() -> None:
    result = shell('"$@" | head -n 1', *PREDICT.split(), PYTHONUNBUFFERED="1")
    assert result.stderr == "" and result.stdout.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_line_goes_out_whole(unbuffered: str) -> None:
    """Else lines of ranks that speak at once run into each other. Each write of a process is a message of a socket."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    environment = {**jobs.ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-c", SPEAKING, os.devnull]
    here.settimeout(10)
    with here, there:
        subprocess.run(command, env=environment, stdout=there, stderr=there, check=True, timeout=60)
        messages = [here.recv(1000).decode() for _ in range(3)]
    assert messages == ["distconv: this is for people\n", "and so is this\n", "and this\n"]


SPEAKING = """
import os, sys
from distconv.comm.start import run_command
from distconv.process.voice import write
def command(argv):
    with open(argv[0], "w") as file:
        file.write("mine")
        file.flush()
        write("this is for people")
        print("and so is this", file=sys.stderr, flush=True)
        print("and this", flush=True)
    return 0
run_command(command)
"""


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "2>&-", ">&-"])
def test_what_is_said_to_a_closed_stream_goes_into_no_file(tmp_path: Path, closed: str) -> None:
    arguments = [sys.executable, "-c", SPEAKING, tmp_path / "file"]
    assert jobs.run(None, "bash", "-c", f'exec "$@" {closed}', "bash", *arguments).returncode == 0
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_works_with_all_streams_closed_and_raises_a_low_soft_limit(tmp_path: Path) -> None:
    result = shell('ulimit -Sn 16; exec "$@" <&- >&- 2>&-', *train(tmp_path / "run"))
    assert result.returncode == 0 and (tmp_path / "run" / "DONE").exists()


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # so that Python, too, knows no other characters


def test_a_name_that_the_terminal_cannot_show_is_no_obstacle(tmp_path: Path) -> None:
    name = "Möwe-한글 'and' \"so\"\nin two lines \\"
    result = shell('"$@"', *train(tmp_path / name), PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and result.stderr == "" and result.stdout.isascii()
    assert (tmp_path / name / "DONE").exists()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (train(Path(os.fsdecode(b"no\xffne"))), 2),
        (("train", "--config", b"no\xffne"), 66),
        (("train", "--model", b"no\xff:ne"), 2),
        (("train", b"--no\xffne"), 2),
        ((b"no\xffne",), 2),
        (("evaluate", b"no\xffne.safetensors"), 66),
    ],
)
@pytest.mark.parametrize("locale", [{}, ASCII])
def test_bytes_that_are_no_text_are_one_sentence(
    command: tuple[str | bytes, ...], code: int, locale: dict[str, str]
) -> None:
    assert_one_sentence(shell('"$@"', *command, **locale), code, "udcff")


def test_a_sentence_has_nothing_that_a_terminal_obeys() -> None:
    assert_one_sentence(shell('"$@"', "evaluate", "\x1b[2Jnone.pkl"), 66, r"\x1b[2Jnone.pkl")


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("-n 20", "20 open files"),
        ("-v 400000", "409,600,000 bytes of memory"),
        ("-f 1", "1,024 bytes of a file"),
        ("-f 4096", "4,194,304 bytes of a file"),
    ],
)
def test_a_limit_that_is_too_low_is_named(tmp_path: Path, limit: str, words: str) -> None:
    result = shell(f'ulimit {limit}; exec "$@"', *train(tmp_path / "run"))
    assert_one_sentence(result, 1, words, f"ulimit {limit[:2]}")


@pytest.mark.slow
def test_without_a_home_a_run_works_and_leaves_nothing_elsewhere(tmp_path: Path) -> None:
    script = f'cd {tmp_path}; exec "$@"'  # HOME is no absolute path: as where there is none, and no entry in passwd
    where = {
        "HOME": "nowhere",
        "XDG_CACHE_HOME": "",
        "NUMBA_CACHE_DIR": "",
        "PYTHONPATH": str(jobs.ROOT),
        "MPLCONFIGDIR": str(tmp_path),
    }
    kernels = {"NUMBA_CACHE_DIR": str(CACHE.folder.parent)}
    result = shell(script, *train(tmp_path / "run"), **{**where, **kernels})
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert not (tmp_path / "nowhere").exists() and not (tmp_path / "~").exists()
    assert_one_sentence(shell(script, "data", "fetch", "mnist", **where, DISTCONV_DATA_DIR=""), 66, "DISTCONV_DATA_DIR")
    rows = [json.loads(line) for line in shell(script, "doctor", "--json", **where).stdout.splitlines()]
    (disks,) = (row for row in rows if row["check"] == "disks")
    assert disks["status"] == "slow" and "cannot be written" in disks["found"]


@pytest.mark.slow
def test_in_a_folder_that_is_gone_a_command_works_or_says_so(tmp_path: Path) -> None:
    gone = f'mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir ../gone; exec "$@"'
    where = {"PYTHONPATH": str(jobs.ROOT)}
    assert_one_sentence(shell(gone, "train", *QUICK, **where), 73, "runs")
    assert_one_sentence(shell(gone, *train(tmp_path / "run"), "--model", "mine:network", **where), 2, "no module mine")
    result = shell(gone, "doctor", "--json", **where)
    assert result.returncode == 1 and result.stderr == ""
    (disks,) = (row for row in map(json.loads, result.stdout.splitlines()) if row["check"] == "disks")
    assert disks["status"] == "slow" and "has been removed" in disks["found"]


def test_from_the_folder_that_holds_a_checkout_named_distconv_the_package_is_found(tmp_path: Path) -> None:
    (tmp_path / "distconv").symlink_to(jobs.ROOT)  # to Python, a package without an __init__.py
    result = shell(f'cd {tmp_path}; exec "$@"', "--version")
    assert result.returncode == 0, "installed before pyproject.toml said package-dir: pip install -e . again"
