"""distconv.launch with a stand-in for mpirun and its job, which does what a test has it do."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from tests import jobs

# Stands for mpirun and its job. Each start does what the next part of PLAY says; the last one is repeated.
JOB = """
import json, os, pathlib, signal, subprocess, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
for folder in (out, out / "checkpoints", out / "errors"):
    folder.mkdir(exist_ok=True)

def note(name, **fields):
    with (out / name).open("a") as file:
        file.write(json.dumps(fields) + chr(10))

def trains(step):
    note("metrics.jsonl", event="start")
    note("metrics.jsonl", event="step", step=step)

def saves(step):
    trains(step)
    (out / f"checkpoints/step-{step:010d}.safetensors").touch()

def fails(error, code=1):
    report = {"rank": 1, "host": "n1", "error": error, "exit_code": code}
    (out / "errors/rank-1.json").write_text(json.dumps(report))
    sys.exit(code)

def finishes(code=0):
    note("metrics.jsonl", event="final", step=99)
    (out / "DONE").touch()
    sys.exit(code)

def killed(number=9):
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.kill(os.getpid(), number)

def waits():
    "For signals, and a little longer for more of them; to the launcher's own process, not to its group."
    numbers = [signal.SIGUSR1, signal.SIGINT, signal.SIGTERM]
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    note("waits")
    got = signal.sigtimedwait(numbers, 30)
    while got:
        note("signals", number=got.si_signo)
        got = signal.sigtimedwait(numbers, 0.25)

def leaves():
    "A process that no signal to this one, its group or its session reaches."
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    note("left", pid=child.pid)

note("starts", arguments=sys.argv[1:])
plays = os.environ["PLAY"].split(" | ")
number = len((out / "starts").read_text().splitlines())
exec(plays[min(number, len(plays)) - 1])
"""


def mpirun(folder: Path) -> str:
    """The command of a stand-in that is put into this folder."""
    (folder / "job.py").write_text(JOB)
    return shlex.join([sys.executable, str(folder / "job.py")])


def supervise(out: Path, play: str, *flags: str, train: tuple[str, ...] = ()) -> jobs.Job:
    """A running distconv.launch, whose job writes to `out`; the stand-in lies beside it."""
    starter = mpirun(out.parent)
    arguments = ["-m", "distconv.launch", "-n", "2", "--mpirun", starter, *flags, "--", "--out", out, *train]
    return jobs.Job(0, arguments, PLAY=play)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def starts(out: Path) -> int:
    return len(lines(out / "starts"))
