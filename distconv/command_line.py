"""What the command lines of all commands share: one sentence for a wrong flag, and how a saved model is named."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from distconv.errors import CannotCreateError, UsageError
from distconv.process.launched import launcher_rank

WEIGHTS = ("raw", "averaged")


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError, names the flag that was perhaps meant, and prints help on one rank only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        known = list(self._option_string_actions)
        words = [word.rstrip(":") for word in message.split()]
        wrong = next((word for word in words if word.startswith("--") and word not in known), "")
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            wrong, known = choice[1], choice[2].replace("'", "").split(", ")
        raise UsageError(f"{message}{nearest(wrong, known)}; {self.prog} --help lists the flags")

    def parse_before_dashes(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The flags before --, and what stands behind it: the flags of distconv.train. Raises UsageError."""
        dashes = list(argv).index("--") if "--" in argv else len(argv)
        flags, unknown = self.parse_known_args(argv[:dashes])
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}: the flags of distconv.train stand behind --")
        return flags, list(argv[dashes + 1 :])

    def print_help(self, file: Any = None) -> None:
        if launcher_rank() == 0:
            super().print_help(file)


def add_model_arguments(parser: Parser, several: bool) -> None:
    """The arguments of a command that reads a saved model, or several: `files` is a list of paths."""
    parser.add_argument(
        "files",
        type=Path,
        nargs="+" if several else 1,
        metavar="RUN",
        help="a run's folder, for its newest good checkpoint, a checkpoint, or a pickle or .npz of arrays W1, b1, ..."
        + "; or the folder of an ensemble, for each of its runs" * several,
    )
    add_weights_argument(parser)
    parser.add_argument("--data", default=None, help="as in distconv.train (default: what the model was trained on)")
    parser.add_argument(
        "--model", default=None, help="of a pickle or .npz (default: deepconvnet); a checkpoint knows its own"
    )


def add_weights_argument(parser: Parser) -> None:
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="of a run with --ema: those of its last step, or their average (default: the average where there is one)",
    )


def check_file(name: str, path: Path | None, ending: str) -> None:
    """Before anything is computed: whether a file that a flag names can be written.

    Raises UsageError for another ending, which a file of a run or of somebody's may have, and CannotCreateError where
    no such file can be.
    """
    if path is None:
        return
    if path.suffix.lower() != ending:
        raise UsageError(f"{name} {path}: the name of a file that ends in {ending} was expected")
    if os.path.isdir(path):  # noqa: PTH112 (pathlib raises where a name is too long)
        raise CannotCreateError(f"{name} {path} is a folder: name another file")
    if not os.path.isdir(path.parent):  # noqa: PTH112
        raise CannotCreateError(f"{name} {path}: there is no folder {path.parent}; make it, or name another file")


def nearest(word: str, choices: Sequence[str]) -> str:
    """The choice that was perhaps meant, as the end of a sentence; empty where none is like the word.

    A word in capitals is like one of ours, all of which are in small letters.
    """
    close = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0.7)
    return f" (did you mean {close[0]}?)" if close else ""
