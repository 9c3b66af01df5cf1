"""`python -m distconv.launch -n 4 -- FLAGS`: distconv.train, started again after accidents. Flags -> supervisor."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from distconv.comm.start import run_command
from distconv.command_line import Parser
from distconv.errors import CannotCreateError, UsageError
from distconv.process.voice import write
from distconv.run.describe import text_to_print
from distconv.run.folder import new_folder
from distconv.settings import read_settings
from distconv.supervise.launcher import job_command, job_starter, refuse_to_nest
from distconv.supervise.supervisor import Supervisor


def main(argv: Sequence[str]) -> int:
    flags, train = from_command_line(argv)
    settings, print_only = read_settings(train)
    if print_only:
        print(text_to_print(settings, print_only), end="")
        return 0
    refuse_to_nest("launch")
    if settings.ensemble > 1:
        raise UsageError("--ensemble: start one launch for each run, with a --seed and an --out of its own")
    starter = job_starter(flags.mpirun)
    try:
        out = Path(settings.out) if settings.out else new_folder(settings.model)
    except OSError as error:
        raise CannotCreateError(f"no folder can be made in runs/ ({error.strerror}): give one by --out") from None

    def command(restart: int, step: int, missing: int) -> list[str]:
        """The first start obeys --resume; a later one goes on from what it finds."""
        resume = ["--resume", "auto"] if restart and (step or settings.resume == "never") else []
        ranks = flags.ranks - missing
        return job_command(starter, ranks, ["-m", "distconv.train", *train, "--out", str(out), *resume])

    supervisor = Supervisor(command, out, flags.restarts, spare=flags.ranks - flags.at_least)
    code = supervisor.run()
    if supervisor.has_trained():
        write(supervisor.summary())
    return code


def from_command_line(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The supervisor's own flags, and those of distconv.train. Raises UsageError."""
    parser = Parser(
        prog="python -m distconv.launch",
        usage="python -m distconv.launch -n RANKS [--at-least M] [--restarts N] [--mpirun COMMAND] -- FLAGS OF "
        "distconv.train",
        description="Train, and after an accident start again from the last good checkpoint, at once, or after a pause "
        "that\ngrows where no new checkpoint is made. Starts mpirun by itself.\n\n"
        "It ends, with the job's exit code, when the run is done, when another start would not help (a wrong flag,\n"
        "bad data), or when the same error came twice: at the same step, or before the first one. SIGTERM, SIGUSR1\n"
        "or Ctrl-C: the job stops with a checkpoint, and this ends with 75; the same command with the same --out goes\n"
        "on. A second Ctrl-C ends the job at once.\n\n"
        "At the end it says the goodput: the share of its own time that got the run ahead for good. From each first\n"
        "step to the last record that stays in metrics.jsonl, all counts: steps, evaluations, checkpoints. What does\n"
        "not: to start, steps that were lost and are done again, pauses, the curves at the end.",
        epilog="examples:\n"
        "  python -m distconv.launch -n 4 -- --data mnist --epochs 20\n"
        "  python -m distconv.launch -n 4 --at-least 2 -- --shards 8      # may lose ranks, and none of its bits\n"
        "  python -m distconv.launch -n 8 --mpirun 'srun --mpi=pmi2 -K' -- --out runs/mine",
    )
    parser.add_argument("-n", "--ranks", type=int, required=True, help="how many ranks train")
    parser.add_argument(
        "--at-least",
        type=int,
        metavar="M",
        help="go on with the ranks that are left, M or more: where a restart brings no new checkpoint, the next has a "
        "rank fewer. With --shards, the run ends with the same bits (default: as -n)",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=10,
        metavar="N",
        help="give up after so many in a row that made no new checkpoint (default: 10)",
    )
    parser.add_argument(
        "--mpirun",
        metavar="COMMAND",
        help="what starts ranks and passes SIGUSR1 on to them, as 'srun --mpi=pmi2' (default: mpirun)",
    )
    flags, train = parser.parse_before_dashes(argv)
    if flags.ranks < 1:
        raise UsageError(f"-n {flags.ranks}: expected a number of ranks from 1")
    flags.at_least = flags.ranks if flags.at_least is None else flags.at_least
    if not 1 <= flags.at_least <= flags.ranks:
        raise UsageError(f"--at-least {flags.at_least} with -n {flags.ranks}: expected a number from 1 to that of -n")
    if flags.restarts < 0:
        raise UsageError(f"--restarts {flags.restarts}: expected a number from 0")
    return flags, train


if __name__ == "__main__":
    run_command(main)
