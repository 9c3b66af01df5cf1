"""Data sets by name: mnist, cifar10, digits, an .npz file, a folder in MNIST's or CIFAR-10's form, or a function."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from distconv.data import cifar, cifar_files, digits, download, mnist, npz
from distconv.data.data import Data, is_data
from distconv.data.dataset import Dataset as Dataset
from distconv.errors import CannotCreateError, DownloadError, MissingInputError, UsageError
from distconv.factory import call_factory, is_factory

AUTO = "auto"
NAMES = (AUTO, "mnist", cifar.NAME, "digits")  # which are no paths


def prepare(name: str) -> tuple[str, str]:
    """Make a data set ready for every process of this host; to be called by one of them.

    Returns the name that `load` takes and a line for the user, empty where nothing need be said: "auto" becomes mnist
    if that is at hand or can be fetched, else digits. Files that are there are not read: `load` verifies them.
    Raises what mnist.find, mnist.fetch, cifar.is_there and cifar.fetch raise.
    """
    if name == cifar.NAME and not cifar.is_there():
        cifar.fetch(cifar.cache_folder())
    if name not in (AUTO, "mnist"):
        return name, ""
    if mnist.is_complete(mnist.chosen_folder()) or mnist.find():  # which says what the folder lacks if it was chosen
        return "mnist", ""
    try:
        mnist.fetch()
    except (DownloadError, MissingInputError, CannotCreateError) as error:
        if name == "mnist":
            raise
        if isinstance(error, CannotCreateError):
            why = str(error)
        else:
            why = "it is not on this machine and " + ("offline is set" if download.offline() else "no mirror answers")
        return "digits", f"no MNIST ({why}): training on the built-in digits; --data DIR names a folder with MNIST"
    return "mnist", ""


def load(name: str, say: Callable[[str], None] = lambda line: None) -> Data:
    """The data set of that name, once `prepare` has been called on this host. say prints a line for the user.

    Raises MissingInputError, BadDataError, StorageError, or UsageError for a function that gives no Data.
    """
    if name == "mnist":
        return mnist.load()
    if name == cifar.NAME:
        return cifar.load()
    if name == "digits":
        return digits.load()
    if is_function(name):
        found: Data = call_factory(name)
        if not is_data(found):
            kind = type(found).__name__
            raise UsageError(f"--data {name} returned {kind}, but something like a distconv.data.Dataset is expected")
        return found
    if name.lower().endswith(".npz"):
        return npz.load(Path(name), say)
    if mnist.is_in_part(Path(name)):  # a folder with MNIST may hold CIFAR-10 in another one
        return mnist.load_folder(Path(name))
    if place := cifar_files.locate(Path(name)):
        return cifar.load_from(place, name)
    raise _no_data_set(name)


def is_function(name: str) -> bool:
    """Whether a function gives the data set of that name."""
    return is_factory(name) and not os.path.exists(name)  # noqa: PTH110 (pathlib raises where a name is too long)


def _no_data_set(name: str) -> MissingInputError:
    """What to say of a name that leads to none: what is there, and all that may be given."""
    if os.path.isdir(name) and not os.access(name, os.R_OK | os.X_OK):  # noqa: PTH112
        what = "is a folder that may not be read"
    elif os.path.isdir(name):  # noqa: PTH112
        what = "is a folder without the files of MNIST or CIFAR-10 (of pictures, docs/data.md makes an .npz)"
    elif os.path.exists(name):  # noqa: PTH110
        what = "is neither a folder nor an .npz or .tar.gz file"
    else:
        what = "does not exist"
    return MissingInputError(
        f"{name or 'an empty name'} {what}: give mnist, cifar10 or digits, an .npz file that holds "
        f"{', '.join(npz.NEEDED)}, a folder with {', '.join(mnist.FILES)} (plain or .gz) or CIFAR-10's, or "
        "package.module:function"
    )
