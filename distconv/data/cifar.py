"""CIFAR-10: find it, fetch it once, verify it. Krizhevsky, "Learning Multiple Layers of Features", 2009.

A file is trusted when the SHA-256 of its *records*, as the binary form has them, is the known one, so any form and any
archive will do; but its folder or archive must have an official name.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np

from distconv.data import cifar_files, download
from distconv.data.dataset import Bytes, Dataset
from distconv.errors import BadDataError, DistconvError, DownloadError, MissingInputError

NAME = "cifar10"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {  # name: SHA-256 of its 10,000 records; the last is the test set
    "data_batch_1": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
URLS = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",)


def cache_folder() -> Path:
    """Where downloads go."""
    return download.cache_folder(NAME)


def chosen_place() -> Path | None:
    """Where DISTCONV_DATA_DIR holds CIFAR-10, maybe beside other sets. Raises MissingInputError if it is no folder."""
    chosen = download.chosen_folder()
    if chosen and not chosen.is_dir():
        raise MissingInputError(f"{chosen} is not a folder, but DISTCONV_DATA_DIR names it: give one with data sets")
    return cifar_files.locate(chosen) if chosen else None


def is_there() -> bool:
    """Whether DISTCONV_DATA_DIR or the user's cache holds it; it is not read. Raises what chosen_place does."""
    return bool(chosen_place() or cifar_files.locate(cache_folder()))


def load() -> Dataset:
    """CIFAR-10, verified, as DISTCONV_DATA_DIR holds it, or else the user's cache, into which it is fetched if need be.

    Raises what `load_from` and `fetch` raise; MissingInputError, BadDataError or StorageError where DISTCONV_DATA_DIR
    holds something in its form that is not CIFAR-10.
    """
    if place := chosen_place():
        return load_from(place, NAME, official=True)
    if place := cifar_files.locate(cache_folder()):
        try:
            return load_from(place, NAME, official=True)
        except DistconvError:
            pass  # it is damaged, and fetched again
    return load_from(fetch(cache_folder()), NAME, official=True)


def fetch(folder: Path) -> Path:
    """Bring CIFAR-10 into a folder where that lacks it -> the folder or archive in it; one process at a time does that.

    Raises DownloadError where no mirror gives it, MissingInputError where DISTCONV_OFFLINE=1 forbids to ask,
    CannotCreateError where the folder cannot be written, BadDataError where DISTCONV_DATA_DIR holds another set.
    """
    problem, place = _problem(folder), cifar_files.locate(folder)
    if place and not problem:
        return place
    if place and problem and folder == download.chosen_folder():
        raise problem  # a user's own file is not replaced
    wanted = ", ".join([*(form.folder for form in cifar_files.FORMS), *(form.archive for form in cifar_files.FORMS)])
    if download.offline():
        raise MissingInputError(
            f"{problem}; DISTCONV_OFFLINE forbids to fetch it: set DISTCONV_DATA_DIR to a folder with one of {wanted}"
        )
    target = folder / cifar_files.BINARY.folder

    def keep(got: Path) -> None:
        load_from(got, NAME, official=True)
        whole = got.parent / target.name
        whole.mkdir()
        for file, content in cifar_files.unpack(got).items():
            (whole / file).write_bytes(content)
        if target.exists():  # a damaged one
            shutil.rmtree(target)
        whole.rename(target)

    with download.alone_in(folder):
        if _problem(folder) and (failures := download.from_first(URLS, folder, keep)):
            raise DownloadError(
                f"CIFAR-10 could not be fetched ({failures}): copy one of {wanted} into {folder}, or name a folder "
                "that holds one by DISTCONV_DATA_DIR"
            )
    return target


def _problem(folder: Path) -> DistconvError | None:
    """What keeps a folder from holding CIFAR-10, or None."""
    place = cifar_files.locate(folder)
    if not place:
        return MissingInputError(f"CIFAR-10 is not in {folder}")
    try:
        load_from(place, NAME, official=True)
    except DistconvError as error:
        return error
    return None


def load_from(place: Path, name: str, official: bool = False) -> Dataset:
    """The set of that name in a folder or an archive, which `locate` gave. official: it must be CIFAR-10.

    Images are (N, 32, 32, 3), uint8; there are as many classes as names. Raises MissingInputError, BadDataError,
    StorageError.
    """
    where, class_names, batches = cifar_files.read(place)
    if len(class_names) < 2:
        raise BadDataError(f"{where} names {len(class_names)} classes, but a line for each of two or more was expected")
    names_in = where
    if official and class_names != CLASSES:
        raise BadDataError(f"{where} names {class_names}"[:200] + f", but CIFAR-10's are {', '.join(CLASSES)}")
    parts = []
    for where, batch, records in batches:
        _check(where, batch, records, len(class_names), names_in, official)
        parts.append(records)
    test = [parts.pop()]
    train_images, train_labels = cifar_files.images_and_labels(parts)
    test_images, test_labels = cifar_files.images_and_labels(test)
    return Dataset(
        name, train_images, train_labels, test_images, test_labels, len(class_names), class_names=class_names
    )


def _check(where: str, batch: str, records: Bytes, classes: int, names_in: str, official: bool) -> None:
    """Raise BadDataError for no records, a wrong label, or what is another batch of CIFAR-10 or, if official, none."""
    if not len(records):
        raise BadDataError(f"{where} holds no images: unpack the archive again")
    labels = records[:, 0]
    if labels.max() >= classes:
        first = int(np.argmax(labels >= classes))
        raise BadDataError(
            f"{where}: label number {first} is {labels[first]}; labels must lie in 0 to {classes - 1}, as {names_in} "
            f"names {classes} classes"
        )
    digest = hashlib.sha256(records.data).hexdigest()
    owner = next((owner for owner, known in BATCHES.items() if known == digest), None)
    if owner not in (None, batch):
        raise BadDataError(f"{where} holds CIFAR-10's {owner}: files are swapped; give them their names back")
    if official and owner is None:
        raise BadDataError(
            f"{where} is not CIFAR-10's: its records have SHA-256 {digest}, expected {BATCHES[batch]}; fetch it again, "
            "or name its folder by --data to use another data set"
        )
