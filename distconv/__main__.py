"""`distconv COMMAND` and `python -m distconv COMMAND`: every command under one name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NoReturn

from distconv import __version__
from distconv.comm.start import run_command
from distconv.command_line import Parser
from distconv.process.launched import launcher_rank

COMMANDS = {  # each a module of this package, with a main of its own
    "train": "train a network across MPI ranks",
    "launch": "train, and start again after accidents; starts mpirun itself",
    "evaluate": "test accuracy of saved models and their ensemble, and what they confuse",
    "misclassified": "draw the first test images that a saved model gets wrong",
    "report": "one page that shows what happened in a run, or in several",
    "export": "write a model's weights as an .npz file, named as the textbook does",
    "prove": "show that N ranks compute what one rank computes",
    "reproduce": "train a run again, and say whether it has the same bits",
    "bench": "measure a step, the exchange, the scaling of this machine",
    "doctor": "look for what would go wrong on these hosts",
    "data": "fetch a data set, on a node that has a network",
}


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in COMMANDS:
        module = "distconv.data.__main__" if argv[0] == "data" else f"distconv.{argv[0]}"
        code: int = importlib.import_module(module).main(argv[1:])
        return code
    if argv and argv[0] == "--version":
        if launcher_rank() == 0:
            print(f"distconv {__version__}")
        return 0
    parser = Parser(
        prog="distconv",
        usage="distconv COMMAND [--help] ...",
        description="Synchronous data-parallel training over MPI. `python -m distconv.COMMAND` does the same.",
        epilog="commands:\n"
        + "".join(f"  {name:<15}{text}\n" for name, text in COMMANDS.items())
        + "\nexamples:\n  mpirun -n 4 distconv train --epochs 3\n  distconv doctor\n  distconv train --help",
    )
    parser.add_argument("command", choices=tuple(COMMANDS), metavar="COMMAND", help="one of those below")
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.parse_args(argv or ["--help"])
    return 0


def console() -> NoReturn:
    """The entry of the console command."""
    run_command(main)


if __name__ == "__main__":
    console()
