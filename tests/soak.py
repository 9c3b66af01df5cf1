"""Kill a supervised run at random moments, and see whether it ends as if nothing had happened.

test_soak.py does so ten times; `python -m tests.soak --kills 200` as often as you like, with the MPI at hand.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from distconv.run.log import read_metrics
from distconv.supervise.supervisor import last_record
from tests import jobs
from tests.test_train import metrics, parameters

FLAGS = ("--data", "digits", "--limit-train", "150", "--batch-size", "32", "--eval-samples", "100")
STEPS_OF_AN_EPOCH = 5
EPOCHS_OF_A_KILL = 3  # more than a kill can let pass, so that the run does not end before its kills
MOMENTS = ("start", "step", "step", "save", "evaluation")
TO_COME = 240.0  # seconds within which a moment has to come, on a busy machine


class Victim:
    """A supervised run that is killed again and again. log: all that it says."""

    def __init__(self, out: Path, epochs: int, checkpoint_seconds: str) -> None:
        self.out, self.log = out, out.with_suffix(".log")
        flags = [*FLAGS, "--epochs", str(epochs), "--checkpoint-seconds", checkpoint_seconds, "--out", str(out)]
        launch = [sys.executable, "-m", "distconv.launch", "-n", "2", "--restarts", "1000", "--", *flags]
        # Into a file, as nobody empties a pipe meanwhile.
        self.job = jobs.Job(None, ["bash", "-c", 'exec "$@" > "$0" 2>&1', self.log, *launch])
        self.mpirun: psutil.Process | None = None  # of the start that was killed last

    def kill(self, moment: str, chance: random.Random) -> str:
        """Wait for a new start, and for a moment of it, and kill what chance has chosen. Returns what was killed."""
        self.wait_until(self.has_started_again)
        steps = self.steps()
        if moment == "start":
            self.wait_at_most(chance.uniform(0, 2), lambda: self.steps() != steps)
        elif moment == "step":
            further = chance.randrange(1, 2 * STEPS_OF_AN_EPOCH)
            self.wait_until(lambda: self.steps() >= steps + further)
            time.sleep(chance.uniform(0, 0.02))  # within the next one
        elif moment == "save":
            self.wait_until(lambda: self.steps() > steps)
            self.wait_at_most(2, lambda: any((self.out / "checkpoints").glob(".step-*.tmp")), look=0.0)
        elif moment == "evaluation":
            self.wait_until(lambda: self.steps() > steps and self.steps() % STEPS_OF_AN_EPOCH == 0)
        elif moment == "end":
            self.wait_until(lambda: last_record(self.out / "metrics.jsonl").get("event") == "final")
        ranks = self.ranks()
        # A save is rank 0's, so there all are killed.
        whom = "all ranks" if moment == "save" else chance.choice(["one rank"] * 7 + ["all ranks"] * 2 + ["mpirun"])
        chosen = {"one rank": ranks[:1] if chance.random() < 0.5 else ranks[-1:], "all ranks": ranks}.get(whom)
        if not chosen:
            whom, chosen = "mpirun", [self.mpirun] if self.mpirun else []
        for process in chosen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return whom

    def has_started_again(self) -> bool:
        """Whether there is another mpirun than that of the last kill; what that has left may be there still."""
        for child in psutil.Process(self.job.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "-n" in child.cmdline() and child != self.mpirun:
                    self.mpirun = child
                    return True
        return False

    def ranks(self) -> list[psutil.Process]:
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self.mpirun.children(recursive=True) if self.mpirun else []:
                if "python" in child.name():
                    found.append(child)
        return found

    def steps(self) -> int:
        return int(last_record(self.out / "metrics.jsonl").get("step", 0))

    def wait_until(self, happened: Callable[[], bool]) -> None:
        assert self.wait_at_most(TO_COME, happened), f"did not happen within {TO_COME} s:\n{self.log.read_text()}"

    def wait_at_most(self, seconds: float, happened: Callable[[], bool], look: float = 0.002) -> bool:
        until = time.monotonic() + seconds
        while not happened():
            assert self.job.process.poll() is None, f"it ended by itself:\n{self.log.read_text()}"
            if time.monotonic() > until:
                return False
            time.sleep(look)
        return True


def soak(kills: int, seed: int, folder: Path, say: Callable[[str], object] = lambda line: None) -> Counter[str]:
    """Two supervised runs, one of which saves after every step, with so many kills together, against a quiet run.

    Returns how often what was killed when. Raises AssertionError.
    """
    chance, killed = random.Random(seed), Counter[str]()
    epochs = EPOCHS_OF_A_KILL * (kills // 2 + 1)
    quiet = folder / "quiet"
    trained = jobs.run(2, "-m", "distconv.train", *FLAGS, "--epochs", str(epochs), "--out", quiet, seconds=600)
    assert trained.returncode == 0, trained.stderr
    for seconds, times in (("0", kills // 2), ("0.2", kills - kills // 2)):
        victim = Victim(folder / f"run-{seconds}", epochs, seconds)
        try:
            for moment in [*chance.choices(MOMENTS, k=times - 1), "end"]:
                what = f"{victim.kill(moment, chance)} at {moment}"
                killed[what] += 1
                say(f"{what}, step {victim.steps()}")
        except BaseException:
            victim.job.process.kill()
            raise
        said = victim.job.finish(600)
        assert said.returncode == 0, victim.log.read_text()
        say(victim.log.read_text().splitlines()[-1])
        assert_as_quiet(victim.out, quiet)
    return killed


def assert_as_quiet(out: Path, quiet: Path) -> None:
    """The same parameters, moments, losses and accuracies as the run that nobody has disturbed, and nothing left."""
    assert parameters(out) == parameters(quiet)
    for event in ("step", "epoch", "final"):
        assert metrics(out, event) == metrics(quiet, event)
    assert list(out.rglob("*.tmp")) == []
    command_lines = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    assert [words for words in command_lines if str(out) in words] == []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        killed = soak(flags.kills, flags.seed, Path(folder), lambda line: print(line, flush=True))
        quiet = [record for record in read_metrics(Path(folder) / "quiet/metrics.jsonl") if record["event"] == "final"]
    for what, times in sorted(killed.items()):
        print(f"{times:5} {what}")
    print(f"as if nothing had happened: {quiet[0]['parameters_sha256']}, after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
