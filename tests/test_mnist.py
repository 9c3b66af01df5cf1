"""MNIST found, fetched and verified; the mirrors are web servers on this machine."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import numpy as np
import pytest
import requests  # noqa: F401 (now, not when a mirror's time already runs)

from distconv import data
from distconv.data import download, mnist
from distconv.data.__main__ import main as fetch_main
from distconv.errors import BadDataError, CannotCreateError, DownloadError, MissingInputError
from tests import files
from tests.files import NAMES, Mirror, Request, assert_holds, idx_bytes, small_set, write_set

SMALL = small_set()
PACKED = {f"{name}.gz": gzip.compress(idx_bytes(array)) for name, array in SMALL.items()}


@pytest.fixture(autouse=True)
def small_mnist(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without MNIST, whose MNIST is the small set, except where a test wants the real one."""
    for name in ("DISTCONV_DATA_DIR", "DISTCONV_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("HOME", tmp_path), ("XDG_CACHE_HOME", tmp_path / "cache"), ("no_proxy", "127.0.0.1")):
        monkeypatch.setenv(name, str(value))
    if "mnist_folder" not in request.fixturenames:
        known = {name: (array.ndim, files.sha256(array)) for name, array in SMALL.items()}
        monkeypatch.setattr(mnist, "FILES", known)
        monkeypatch.setattr(mnist, "MIRRORS", ())


def test_the_real_mnist_has_its_known_counts_labels_and_brightness(mnist_folder: Path) -> None:
    dataset = mnist.load_folder(mnist_folder)
    assert dataset.train_images.shape == (60_000, 28, 28, 1) and dataset.test_images.shape == (10_000, 28, 28, 1)
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(dataset.train_labels).tolist() == train and np.bincount(dataset.test_labels).tolist() == test
    assert dataset.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert dataset.train_images.mean() / 255 == pytest.approx(0.1307, abs=5e-5)  # what everybody normalizes by


def links(mnist_folder: Path, folder: Path, renamed: dict[str, str]) -> Path:
    """The real files in another folder, some under other names."""
    folder.mkdir()
    for name in NAMES:
        source = next(mnist_folder.glob(f"{name}*"))
        (folder / f"{renamed.get(name, name)}{source.suffix}").symlink_to(source)
    return folder


def test_the_real_mnist_is_verified_and_one_changed_pixel_is_found(
    mnist_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTCONV_DATA_DIR", str(mnist_folder))
    assert mnist.find() is not None
    folder = links(mnist_folder, tmp_path / "changed", {})
    changed = next(folder.glob("t10k-images*"))
    content = changed.read_bytes()
    content = bytearray(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    content[1000] ^= 1
    changed.unlink()
    (folder / "t10k-images-idx3-ubyte").write_bytes(content)
    monkeypatch.setenv("DISTCONV_DATA_DIR", str(folder))
    with pytest.raises(BadDataError) as caught:
        mnist.find()
    for part in ("t10k-images-idx3-ubyte", hashlib.sha256(content).hexdigest()):
        assert part in str(caught.value)


@pytest.mark.parametrize("kinds", [("images", "labels"), ("images",), ("labels",)])
def test_swapped_training_and_test_files_of_the_real_mnist_are_called_swapped(
    mnist_folder: Path, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    pairs = [(train, test) for train, test in (NAMES[0::2], NAMES[1::2]) if any(kind in train for kind in kinds)]
    renamed = dict([*pairs, *(pair[::-1] for pair in pairs)])
    with pytest.raises(BadDataError, match="files are swapped"):
        mnist.load_folder(links(mnist_folder, tmp_path / "swapped", renamed))


@pytest.mark.parametrize("packed", [(), NAMES, NAMES[:1], NAMES[1:3]])
def test_a_folder_may_hold_any_set_in_mnists_form_plain_and_packed(tmp_path: Path, packed: tuple[str, ...]) -> None:
    arrays = small_set(train=11, test=3, height=9, width=6, seed=5)
    dataset = mnist.load_folder(write_set(tmp_path / "mine", arrays, packed))
    assert_holds(dataset, arrays)
    assert dataset.image_shape == (9, 6, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_set(tmp_path / "mine", {other: SMALL[other] for other in NAMES if other != name})
    with pytest.raises(MissingInputError, match=f"{folder} .*{name}"):
        mnist.load_folder(folder)


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        (NAMES[1], SMALL[NAMES[1]][:-1], "6 images and 5 labels"),
        (NAMES[2], SMALL[NAMES[2]][:-1], "3 images and 4 labels"),
        (NAMES[3], np.array([0, 9, 10, 3], np.uint8), "label number 2 is 10"),
        (NAMES[1], np.array([0, 9, 1, 3, 5, 255], np.uint8), "label number 5 is 255"),
        (NAMES[2], SMALL[NAMES[2]][:, :-1], "alike"),
        (NAMES[0], SMALL[NAMES[1]], "may be swapped"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path: Path, name: str, array: np.ndarray, words: str) -> None:
    with pytest.raises(BadDataError, match=words):
        mnist.load_folder(write_set(tmp_path / "mine", {**SMALL, name: array}))


def test_without_a_variable_the_users_cache_is_the_place(tmp_path: Path) -> None:
    assert mnist.find() is None
    folder = write_set(mnist.cache_folder(), SMALL, NAMES)
    assert_holds(mnist.load(), SMALL)
    assert tmp_path / "cache" in folder.parents
    (folder / f"{NAMES[2]}.gz").write_bytes(PACKED[f"{NAMES[2]}.gz"][:-1])
    assert mnist.find() is None


def test_the_variable_names_the_only_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(mnist.cache_folder(), SMALL)
    mine = write_set(tmp_path / "mine", SMALL, NAMES[:2])
    monkeypatch.setenv("DISTCONV_DATA_DIR", str(mine))
    assert_holds(mnist.load(), SMALL)
    (mine / f"{NAMES[1]}.gz").unlink()
    with pytest.raises(MissingInputError, match=f"{mine} .*{NAMES[1]}.*DISTCONV_DATA_DIR"):
        mnist.load()


@pytest.mark.parametrize("content", [b"", PACKED[f"{NAMES[0]}.gz"][:-5], idx_bytes(SMALL[NAMES[0]][::-1])])
def test_a_damaged_file_in_the_chosen_folder_is_named_and_not_fetched_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    mine = write_set(tmp_path / "mine", SMALL)
    (mine / NAMES[0]).write_bytes(content)
    monkeypatch.setenv("DISTCONV_DATA_DIR", str(mine))
    with pytest.raises(BadDataError, match=str(mine / NAMES[0])):
        mnist.load()


def test_offline_opens_no_connection_and_names_the_four_files(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[object] = []
    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (socket, "create_connection")):
        monkeypatch.setattr(owner, name, lambda *arguments: touched.append(arguments))
    monkeypatch.setattr(mnist, "MIRRORS", ("http://127.0.0.1:9/",))
    monkeypatch.setenv("DISTCONV_OFFLINE", "1")
    with pytest.raises(MissingInputError) as caught:
        mnist.load()
    assert all(part in str(caught.value) for part in (*NAMES, "DISTCONV_DATA_DIR", str(mnist.cache_folder())))
    assert not touched
    monkeypatch.setenv("DISTCONV_OFFLINE", "0")  # the same call without it does ask
    with pytest.raises(DownloadError):
        mnist.load()
    assert touched


@contextlib.contextmanager
def mirrors(monkeypatch: pytest.MonkeyPatch, *answers: files.Answer) -> Iterator[list[Mirror]]:
    """Mirrors that answer so, in this order; patience with those that do not is short."""
    monkeypatch.setattr(download, "SECONDS_TO_FIRST_BYTE", 0.5 if files.silent in answers else 20.0)
    monkeypatch.setattr(download, "SECONDS_BETWEEN_BYTES", 0.5 if files.stalling in answers else 20.0)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # no thread of its own
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Mirror(PACKED, answer)) for answer in answers]
        monkeypatch.setattr(mnist, "MIRRORS", tuple(server.url for server in servers))
        yield servers
    for thread in set(threading.enumerate()) - before:
        thread.join(10)


def assert_cache_is_whole_and_tidy() -> None:
    assert_holds(mnist.load_folder(mnist.cache_folder()), SMALL)
    assert {path.name for path in mnist.cache_folder().iterdir()} - {"lock"} == set(PACKED)


@pytest.mark.parametrize("bad", files.BAD_ANSWERS)
def test_a_bad_mirror_is_passed_over_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    have, wanted = NAMES[:-1], f"{NAMES[-1]}.gz"
    write_set(mnist.cache_folder(), {name: SMALL[name] for name in have}, have)
    with mirrors(monkeypatch, files.BAD_ANSWERS[bad], files.good) as (first, second):
        for _ in range(2):  # the second time from the cache
            assert_holds(mnist.load(), SMALL)
            assert first.asked == second.asked == [wanted]
    assert_cache_is_whole_and_tidy()


def test_fetch_brings_what_lacks_to_the_folder_that_is_named_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_set(tmp_path / "mine", {name: SMALL[name] for name in NAMES[:2]})
    monkeypatch.setenv("DISTCONV_DATA_DIR", str(folder))
    with mirrors(monkeypatch, files.good) as (mirror,):
        for _ in range(2):
            assert fetch_main(["fetch", "mnist"]) == 0
            assert capsys.readouterr().out == f"mnist is in {folder}\n"
        assert sorted(mirror.asked) == sorted(f"{name}.gz" for name in NAMES[2:])
    assert_holds(mnist.load(), SMALL)

    another = idx_bytes(SMALL[NAMES[0]] ^ 1)
    (folder / NAMES[0]).write_bytes(another)
    with pytest.raises(BadDataError, match=NAMES[0]):
        mnist.fetch()
    assert (folder / NAMES[0]).read_bytes() == another


@pytest.mark.parametrize("bad", files.BAD_ANSWERS)
def test_bad_mirrors_alone_are_named_and_given_up_soon(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    began = time.monotonic()
    with mirrors(monkeypatch, files.BAD_ANSWERS[bad], files.BAD_ANSWERS[bad]) as servers:
        with pytest.raises(DownloadError) as caught:
            mnist.load()
        assert time.monotonic() - began < 10  # whatever the mirrors do, a user waits no longer
        for part in (*(server.url for server in servers), *NAMES, "DISTCONV_DATA_DIR"):
            assert part in str(caught.value)
    assert [path.name for path in mnist.cache_folder().iterdir() if path.name != "lock"] == []


@pytest.mark.parametrize("name", [NAMES[0], f"{NAMES[0]}.gz"])
def test_a_file_damaged_in_the_cache_is_fetched_again(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = write_set(mnist.cache_folder(), SMALL, () if name in NAMES else NAMES)
    (folder / name).write_bytes(idx_bytes(SMALL[NAMES[0]] ^ 1))
    with mirrors(monkeypatch, files.good) as (mirror,):
        assert_holds(mnist.load(), SMALL)
        assert mirror.asked == [f"{NAMES[0]}.gz"]


def test_a_file_damaged_in_the_cache_is_named_where_nothing_may_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_set(mnist.cache_folder(), SMALL)
    (folder / NAMES[2]).write_bytes(b"")
    monkeypatch.setenv("DISTCONV_OFFLINE", "1")
    name, _ = data.prepare("auto")  # does not read the files, and so does not fall back on the digits
    with pytest.raises(MissingInputError, match=f"{folder / NAMES[2]} .*DISTCONV_OFFLINE"):
        data.load(name)


@pytest.mark.parametrize("place", ["cache", "cache/distconv", "cache/distconv/mnist"])
def test_a_cache_that_cannot_be_made_says_which_variable_helps(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("a file in the folder's place")
    with pytest.raises(CannotCreateError, match=f"{mnist.cache_folder()}.*XDG_CACHE_HOME"):
        mnist.load()


def test_a_lock_that_is_never_released_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "LOCK_SECONDS", 0.1)
    mnist.cache_folder().mkdir(parents=True)
    lock = mnist.cache_folder() / "lock"
    with filelock.FileLock(lock), pytest.raises(DownloadError, match=str(lock)):
        mnist.load()


OTHER_PROCESS = """
import json, sys, filelock, pooch, requests
from distconv import data
from distconv.data import mnist
mnist.FILES, mnist.MIRRORS = json.loads(sys.argv[1])
print("begin", flush=True)
print(mnist.load().digest)
"""


@contextlib.contextmanager
def other_process() -> Iterator[subprocess.Popen[str]]:
    """A process that obtains the small MNIST as this one would; it has begun."""
    arguments = [sys.executable, "-c", OTHER_PROCESS, json.dumps([mnist.FILES, mnist.MIRRORS])]
    with subprocess.Popen(arguments, cwd=files.ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begin\n"
        yield process
        process.kill()


def test_two_processes_fetch_each_file_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, asked_again, go_on = threading.Event(), threading.Event(), threading.Event()

    def answer(request: Request, content: bytes) -> None:
        (asked_again if asked.is_set() else asked).set()
        go_on.wait(30)
        files.good(request, content)

    with mirrors(monkeypatch, answer) as (mirror,), other_process() as one:
        assert asked.wait(30)
        with other_process() as other:
            asked_again.wait(0.5)  # time enough to ask, for a process that does not wait for the first
            go_on.set()
            assert one.wait(30) == 0 and other.wait(30) == 0
        assert mirror.asked == list(PACKED)
    assert_cache_is_whole_and_tidy()


def test_a_process_killed_while_it_fetches_leaves_no_half_file_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    half = threading.Event()

    def answer(request: Request, content: bytes) -> None:
        if request.name.startswith(NAMES[1]) and not half.is_set():
            request.reply(content[:20], length=len(content))
            half.set()
            request.server.closing.wait(30)
        else:
            files.good(request, content)

    with mirrors(monkeypatch, answer) as (mirror,):
        with other_process() as killed:
            assert half.wait(30)
            killed.kill()
            killed.wait(30)
        assert mnist.find() is None
        assert_holds(mnist.load(), SMALL)
        assert mirror.asked.count(f"{NAMES[0]}.gz") == 1  # what was whole stayed
