"""`python -m distconv.doctor`: what would go wrong on these hosts. Flags -> checks -> printing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from distconv.comm.start import run_command, start
from distconv.comm.world import World, end_job
from distconv.command_line import Parser
from distconv.process.launched import Launched, launched
from distconv.process.roll_call import ranks_here, stopped
from distconv.process.voice import speak

if TYPE_CHECKING:
    from distconv.checkup.checks import Finding
    from distconv.checkup.facts import Facts

# Since the beginning; all of it may take 10.
SECONDS_TO_START = 6.5  # until MPI runs
SECONDS_FOR_FACTS = 5.0  # until the exchange begins, or is left out
SECONDS_TO_ANSWER = 7.5  # until every rank has told its facts
SECONDS_IN_ALL = 8.0  # until it is given up, as speaking takes some, too
VERDICTS = {"ok": "ready", "slow": "runs, but not as well as it could", "fault": "not ready"}


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m distconv.doctor",
        description="Look for what would go wrong with a job on these hosts: programs that differ, cores, memory, "
        "disks, GPUs,\nclocks, and an exchange that is checked and timed. Start it as you start the training. It ends "
        "within 10 s.",
        epilog="examples:\n"
        "  python -m distconv.doctor                    # this host\n"
        "  mpirun -n 4 python -m distconv.doctor        # the ranks and hosts of a job\n"
        "  srun --mpi=pmi2 python -m distconv.doctor --json\n\n"
        "Exit code 0: all is well; 1: something is wrong (fault) or slower than it need be (slow).\n"
        "--json: check status (ok, slow, fault) found advice, a line each; the last check is the verdict.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    flags = parser.parse_args(argv)

    deadline, told = Deadline(), launched()
    with attendance(told) as absent:
        world = start(limit=SECONDS_TO_START, absent=absent)
    with world:
        from distconv.run.log import RunLog

        say = RunLog(world.rank == 0).say
        findings = examine(world, deadline, say, flags.json)
        deadline.part = "the end"
        worst = max((finding.status for finding in findings), key=list(VERDICTS).index)
        worst = world.comm.bcast(worst)
        named = ", ".join(finding.check for finding in findings if finding.status == worst and worst != "ok")
        verdict = VERDICTS[worst] + f": {named}" * bool(named)
        row = {"check": "verdict", "status": worst, "found": verdict, "advice": ""}
        with deadline.lock:  # no verdict once the end has begun
            say(json.dumps(row) if flags.json else verdict)
    deadline.timer.cancel()
    return int(worst != "ok")


class Deadline:
    """Ends the job where the check-up does not come to its end in time, and says at what part it was.

    lock: held from the beginning of that end.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.part = "starting"
        self.lock = threading.Lock()
        self.timer = threading.Timer(SECONDS_IN_ALL, self._end)
        self.timer.daemon = True
        self.timer.start()

    def passed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def _end(self) -> None:
        with self.lock:
            reason = stopped(ranks_here(launched())) or "; a rank is stuck, or its host very busy"
            speak(f"{self.part} has not come to its end within {self.passed():.0f} s{reason}")
            end_job(1)


def examine(world: World, deadline: Deadline, say: Callable[[str], None], as_json: bool) -> list[Finding]:
    """All findings, shown one by one as they are made, on rank 0; others return ones that are no findings."""
    from distconv.checkup.checks import CHECKS, clocks, no_time, ok
    from distconv.checkup.facts import gather_facts

    findings: list[Finding] = []

    def show(finding: Finding) -> None:
        findings.append(finding)
        if as_json:
            say(json.dumps(asdict(finding)))
        else:
            advice = f"\n{'':<21}-> {finding.advice}" if finding.advice else ""
            say(f"{finding.status:<6}{finding.check:<15}{finding.found}{advice}")

    deadline.part = "gathering facts"
    hosts = world.comm.allgather(socket.gethostname())
    everyone = collect(world, gather_facts(world), hosts, deadline)
    if world.rank == 0:
        for check in CHECKS:
            show(check(everyone))
    if not world.comm.bcast(all(f.status != "fault" or f.check != "versions" for f in findings)):
        return findings or [ok("versions", "")]
    from distconv.checkup import trials
    from distconv.comm.clocks import read_clocks

    deadline.part = "comparing clocks"
    readings = read_clocks(world, time.time_ns)
    if world.rank == 0:
        show(clocks({rank: reading.offset / 1e9 for rank, reading in readings.items()}, everyone))
    if world.comm.bcast(deadline.passed()) > SECONDS_FOR_FACTS:
        show(no_time("exchange"))
        return findings
    deadline.part = "the exchange"
    show(trials.exchange(world))
    if not launched().launcher:
        deadline.part = "starting an mpirun"
        show(trials.mpirun(SECONDS_IN_ALL - deadline.passed() - 1))
    return findings


def collect(world: World, facts: Facts, hosts: Sequence[str], deadline: Deadline) -> list[Facts]:
    """The facts of all ranks, on rank 0; ends the job where one does not tell them in time, and names it."""
    if world.rank > 0:
        world.comm.send(facts, dest=0)
        return []
    told = {0: facts}
    while len(told) < world.size:
        if world.comm.iprobe():
            answer = world.comm.recv()
            told[answer["rank"]] = answer
        elif deadline.passed() > SECONDS_TO_ANSWER:
            silent = [f"rank {rank} on {hosts[rank]}" for rank in range(world.size) if rank not in told]
            speak(f"no answer from {', '.join(silent[:8])}: look at that host")
            end_job(1)
        else:
            time.sleep(0.005)
    return [told[rank] for rank in range(world.size)]


@contextlib.contextmanager
def attendance(told: Launched) -> Iterator[Callable[[], str]]:
    """A list of the ranks that have come, in a folder that the hosts of a cluster mostly share: the user's cache.

    Yields what tells who has not. MPI cannot tell, as it has not started.
    """
    import platformdirs

    job = [os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "PWD")]
    key = hashlib.sha256("\0".join([*job, str(told.size)]).encode()).hexdigest()[:12]
    folder = Path(platformdirs.user_cache_dir("distconv")) / "doctor" / key
    mine = folder / f"rank-{told.rank}"
    began = 0.0
    with contextlib.suppress(OSError):  # nobody is on a list that cannot be written
        folder.mkdir(parents=True, exist_ok=True)
        mine.write_text(socket.gethostname())
        began = mine.stat().st_mtime
        for left in folder.parent.glob("*/rank-*"):  # by jobs that were killed
            if left.stat().st_mtime < began - 60:
                left.unlink()

    def still_here() -> None:
        with contextlib.suppress(OSError):
            mine.touch()  # unlike a rank of an earlier job

    again = threading.Timer(SECONDS_TO_START - 1, still_here)
    again.daemon = True
    again.start()

    def absent() -> str:
        came = {}
        with contextlib.suppress(OSError):
            for path in folder.glob("rank-*"):
                if path.stat().st_mtime > began - 1:
                    came[int(path.name.partition("-")[2])] = path.read_text()
        here = ", ".join(f"rank {rank} on {host}" for rank, host in sorted(came.items())[:8])
        missing = [str(rank) for rank in range(told.size) if rank not in came]
        if not came or not missing:
            return "others have not come"
        return f"rank {', '.join(missing[:8])} has not come, while {here} wait: look at the host of the missing one"

    try:
        yield absent
    finally:
        again.cancel()
        with contextlib.suppress(OSError):
            mine.unlink()
            folder.rmdir()


if __name__ == "__main__":
    run_command(main)
