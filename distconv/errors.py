"""The mistakes and misfortunes that one sentence explains, each with the exit code that a script can act on.

A message says what was given, what was expected and what to do. Everything else that is raised is a bug and
ends with a traceback and exit code 1.
"""

from __future__ import annotations

from typing import TypeVar

Failure = TypeVar("Failure", bound="DistconvError")


class DistconvError(Exception):
    """Failure without a code of its own.

    everywhere: all ranks raise it at the same place, so that the job can end without an abort.
    """

    exit_code = 1
    everywhere = False

    def on_all_ranks(self: Failure) -> Failure:
        """The same, as it is raised where all ranks raise it."""
        self.everywhere = True
        return self


class DivergedError(DistconvError):
    """The loss or the state is not finite, or the loss far above that of the start.

    bad_from: the step whose state gave it first.
    """

    def __init__(self, sentence: str, bad_from: int) -> None:
        super().__init__(sentence, bad_from)
        self.bad_from = bad_from

    def __str__(self) -> str:
        return str(self.args[0])


class UsageError(DistconvError):
    """The command line or a configuration value is wrong."""

    exit_code = 2


class BadDataError(DistconvError):
    """A file is there, but what is in it is not what it should be."""

    exit_code = 65


class MissingInputError(DistconvError):
    """A file or a data set that was named is not there."""

    exit_code = 66


class DownloadError(DistconvError):
    """No mirror gave the data set."""

    exit_code = 69


class ReplicasDifferError(DistconvError):
    """Ranks that must hold the same bits do not."""

    exit_code = 70


class CannotCreateError(DistconvError):
    """The output folder cannot be made or is taken."""

    exit_code = 73


class StorageError(DistconvError):
    """Reading or writing failed underway."""

    exit_code = 74


class MismatchError(DistconvError):
    """Ranks, or a checkpoint and its run, disagree about the configuration."""

    exit_code = 78


STOPPED = 75  # not an error: stopped on request with a checkpoint, run me again
HUNG = 76  # a rank or a host gave no sign of life, or did not come on


def text_of(error: BaseException) -> str:
    """What an exception says, which may be one of a user's own class."""
    try:
        return str(error)
    except Exception:
        return "its text cannot be had"


def sentence_of(error: BaseException) -> str:
    """The same behind its kind."""
    text = text_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
