"""CIFAR-10 found, fetched and verified; the mirrors are web servers on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests  # noqa: F401 (now, not when a mirror's time already runs)

from distconv import data
from distconv.data import cifar, download
from distconv.data.__main__ import main as fetch_main
from distconv.data.dataset import Dataset
from distconv.errors import BadDataError, DownloadError, MissingInputError
from tests import files
from tests.cifar import ARCHIVE, FORMS, ONE, RECORDS, WHOLE, archive, assert_holds, binary, changed, write
from tests.files import Mirror, Request, small_set, write_set


@pytest.fixture
def small_cifar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without data, whose CIFAR-10 is RECORDS, and whom no mirror answers."""
    for name in ("DISTCONV_DATA_DIR", "DISTCONV_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("HOME", tmp_path), ("XDG_CACHE_HOME", tmp_path / "cache"), ("no_proxy", "127.0.0.1")):
        monkeypatch.setenv(name, str(value))
    known = {batch: hashlib.sha256(records.tobytes()).hexdigest() for batch, records in RECORDS.items()}
    monkeypatch.setattr(cifar, "BATCHES", known)
    monkeypatch.setattr(cifar, "URLS", ())


def load_by_name() -> Dataset:
    assert data.prepare("cifar10") == ("cifar10", "")
    loaded = data.load("cifar10")
    assert isinstance(loaded, Dataset) and loaded.name == "cifar10"
    assert_holds(loaded)
    return loaded


@pytest.mark.usefixtures("small_cifar")
@pytest.mark.parametrize("form", ["binary", "Python 2"])
@pytest.mark.parametrize("place", ["itself", "sub-folder", "archive"])
def test_the_chosen_folder_may_hold_it_in_any_form_beside_mnist_and_so_may_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, place: str
) -> None:
    long, short = ("bin", "binary") if form == "binary" else ("py", "python")
    for folder in (tmp_path / "chosen", cifar.cache_folder()):
        if place == "archive":
            write(folder, {f"cifar-10-{short}.tar.gz": archive(FORMS[form])})
        else:
            write(folder / f"cifar-10-batches-{long}" if place == "sub-folder" else folder, FORMS[form])
        write_set(folder, small_set())
        if folder.name == "chosen":
            monkeypatch.setenv("DISTCONV_DATA_DIR", str(folder))
        load_by_name()
        monkeypatch.setenv("DISTCONV_DATA_DIR", str(write_set(tmp_path / "only mnist", small_set())))


@pytest.mark.usefixtures("small_cifar")
@pytest.mark.parametrize(
    ("swap", "words"),
    [
        (("data_batch_1", "test_batch"), "data_batch_1.bin holds CIFAR-10's test_batch: files are swapped"),
        (("data_batch_2", "data_batch_4"), "data_batch_2.bin holds CIFAR-10's data_batch_4: files are swapped"),
    ],
)
def test_swapped_files_are_called_swapped_and_another_set_is_not_called_cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: tuple[str, str], words: str
) -> None:
    one, other = swap
    folder = write(tmp_path / "mine", binary({**RECORDS, one: RECORDS[other], other: RECORDS[one]}))
    monkeypatch.setenv("DISTCONV_DATA_DIR", str(folder))
    for name in ("cifar10", str(folder)):
        with pytest.raises(BadDataError, match=words):
            data.load(name)
    altered = RECORDS[one] ^ np.uint8([0] * 3072 + [1])
    write(folder, binary({**RECORDS, one: altered}))
    digest = hashlib.sha256(altered.tobytes()).hexdigest()
    with pytest.raises(BadDataError, match=f"{one}.bin is not CIFAR-10's: .*{digest}.* --data"):
        data.load("cifar10")
    assert data.load(str(folder)).classes == 10
    write(folder, {**binary(), "batches.meta.txt": b"a\n" * 10})
    with pytest.raises(BadDataError, match=r"batches.meta.txt names .*, but CIFAR-10's are airplane, automobile"):
        data.load("cifar10")


@pytest.mark.usefixtures("small_cifar")
def test_a_chosen_folder_that_holds_half_of_it_or_is_none_is_told_and_nothing_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = write(tmp_path / "mine/cifar-10-batches-bin", changed(data_batch_4=None))
    monkeypatch.setenv("DISTCONV_DATA_DIR", str(tmp_path / "mine"))
    for action in (lambda: data.load(data.prepare("cifar10")[0]), lambda: fetch_main(["fetch", "cifar10"])):
        with pytest.raises(MissingInputError, match=f"{half} holds no data_batch_4.bin"):
            action()
    monkeypatch.setenv("DISTCONV_DATA_DIR", str(tmp_path / "none"))
    with pytest.raises(MissingInputError, match=f"{tmp_path / 'none'} is not a folder.*DISTCONV_DATA_DIR"):
        data.prepare("cifar10")


@pytest.mark.usefixtures("small_cifar")
def test_offline_opens_no_connection_and_names_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[object] = []
    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (socket, "create_connection")):
        monkeypatch.setattr(owner, name, lambda *arguments: touched.append(arguments))
    monkeypatch.setattr(cifar, "URLS", (f"http://127.0.0.1:9/{ARCHIVE}",))
    monkeypatch.setenv("DISTCONV_OFFLINE", "1")
    with pytest.raises(MissingInputError) as caught:
        data.prepare("cifar10")
    for part in ("cifar-10-batches-py", ARCHIVE, "DISTCONV_DATA_DIR", str(cifar.cache_folder())):
        assert part in str(caught.value)
    assert not touched


@contextlib.contextmanager
def mirrors(monkeypatch: pytest.MonkeyPatch, *answers: files.Answer) -> Iterator[list[Mirror]]:
    """Mirrors of the archive that answer so, in this order."""
    monkeypatch.setattr(download, "SECONDS_TO_FIRST_BYTE", 0.5 if files.silent in answers else 20.0)
    monkeypatch.setattr(download, "SECONDS_BETWEEN_BYTES", 0.5 if files.stalling in answers else 20.0)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # no thread of its own
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Mirror({ARCHIVE: WHOLE}, answer)) for answer in answers]
        monkeypatch.setattr(cifar, "URLS", tuple(server.url + ARCHIVE for server in servers))
        yield servers
    for thread in set(threading.enumerate()) - before:
        thread.join(10)


def altered(request: Request, content: bytes) -> None:
    request.reply(archive(binary({**RECORDS, "data_batch_3": RECORDS["data_batch_3"] ^ np.uint8(1)})))


BAD_ANSWERS = {**files.BAD_ANSWERS, "altered": altered}


def assert_cache_is_whole_and_tidy() -> None:
    assert {path.name for path in cifar.cache_folder().iterdir()} - {"lock"} == {"cifar-10-batches-bin"}
    assert {path.name for path in (cifar.cache_folder() / "cifar-10-batches-bin").iterdir()} == set(binary())


@pytest.mark.usefixtures("small_cifar")
@pytest.mark.parametrize("bad", BAD_ANSWERS)
def test_a_bad_mirror_is_passed_over_and_the_next_is_asked_once(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    with mirrors(monkeypatch, BAD_ANSWERS[bad], files.good) as (first, second):
        for _ in range(2):  # the second time from the cache
            load_by_name()
            assert first.asked == second.asked == [ARCHIVE]
    assert_cache_is_whole_and_tidy()
    if bad == "altered":
        with mirrors(monkeypatch, altered) as (only,):
            (cifar.cache_folder() / "cifar-10-batches-bin" / "test_batch.bin").unlink()
            with pytest.raises(DownloadError, match=f"{only.url}: .*data_batch_3.bin is not CIFAR-10's.*{ARCHIVE}"):
                data.load("cifar10")


@pytest.mark.usefixtures("small_cifar")
@pytest.mark.parametrize("damage", [None, b"", ONE + ONE])
def test_what_is_damaged_in_the_cache_is_fetched_again(monkeypatch: pytest.MonkeyPatch, damage: bytes | None) -> None:
    write(cifar.cache_folder() / "cifar-10-batches-bin", changed(data_batch_1=damage))
    with mirrors(monkeypatch, files.good) as (mirror,):
        load_by_name()
        load_by_name()
        assert mirror.asked == [ARCHIVE]
    assert_cache_is_whole_and_tidy()


@pytest.mark.usefixtures("small_cifar")
def test_fetch_brings_it_to_the_folder_that_is_named_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_set(tmp_path / "mine", small_set())
    monkeypatch.setenv("DISTCONV_DATA_DIR", str(folder))
    with mirrors(monkeypatch, files.good) as (mirror,):
        for _ in range(2):
            assert fetch_main(["fetch", "cifar10"]) == 0
            assert capsys.readouterr().out == f"cifar10 is in {folder / 'cifar-10-batches-bin'}\n"
        assert mirror.asked == [ARCHIVE]
        load_by_name()
        assert not cifar.cache_folder().exists()
        (folder / "cifar-10-batches-bin/data_batch_1.bin").write_bytes(ONE + ONE)
        with pytest.raises(BadDataError, match=r"data_batch_1.bin is not CIFAR-10's"):
            fetch_main(["fetch", "cifar10"])
        assert (folder / "cifar-10-batches-bin/data_batch_1.bin").read_bytes() == ONE + ONE
