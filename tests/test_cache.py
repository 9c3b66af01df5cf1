"""The cache of compiled kernels: what is kept is used, what is damaged is made anew, what cannot be kept is told."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distconv.kernels import compiled
from tests import jobs
from tests.files import ROOT, python
from tests.test_failures import QUICK, assert_one_sentence


def halved_sum(x: np.ndarray) -> float:
    total = 0.0
    for i in range(x.size):
        total += x[i] / 2
    return total


class Cache:
    """A folder of kernels, and what was said of it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.said: list[str] = []

    def in_a_new_process(self) -> bool:
        """Call the kernel as a process does that has not met it; it must be right. Returns whether it was kept."""
        store = compiled.Store(self.folder)
        store.say = self.said.append
        self.patch.setattr(compiled, "CACHE", store)
        kernel = compiled.compiled(halved_sum)
        assert kernel(np.arange(9.0)) == 18
        return bool(sum(kernel.stats.cache_hits.values()))

    def file(self) -> Path:
        (path,) = self.folder.iterdir()
        return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    return Cache(tmp_path / "kernels", monkeypatch)


def test_a_kernel_is_compiled_once_and_that_is_said_once(cache: Cache) -> None:
    assert not cache.in_a_new_process()
    assert len(cache.said) == 1 and "compiling the kernels, once" in cache.said[0]
    assert cache.in_a_new_process()
    assert len(cache.said) == 1


def flipped(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << int(1000 * place) % 8
    path.write_bytes(content)


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"a bit at {place:.3f}": lambda path, place=place: flipped(path, place) for place in (0.0, 0.001, 0.999)},
    **{
        f"a bit at {place:.3f}": lambda path, place=place: flipped(path, place)
        for place in (random.Random(seed).random() for seed in range(4))
    },
    **{
        f"cut to {share}": lambda path, share=share: os.truncate(path, int(share * path.stat().st_size))
        for share in (0, 0.5)
    },
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "another file": lambda path: path.write_bytes(b"not a kernel at all"),
    "a folder": replaced_by(lambda path: (path / "inside").mkdir(parents=True)),
    "a pipe": replaced_by(os.mkfifo),
    "a link to nowhere": replaced_by(lambda path: path.symlink_to("nowhere")),
    "a link to zeros": replaced_by(lambda path: path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_kernel_is_never_run_but_made_anew_and_that_is_said(cache: Cache, damage: str) -> None:
    cache.in_a_new_process()
    cache.said.clear()
    DAMAGES[damage](cache.file())
    assert not cache.in_a_new_process()
    (line,) = cache.said
    assert "is damaged" in line and str(cache.folder) in line
    assert cache.in_a_new_process() and len(cache.said) == 1  # it was mended


def test_what_numba_cannot_load_is_made_anew_though_it_is_as_it_was_written(cache: Cache) -> None:
    cache.in_a_new_process()
    cache.said.clear()
    compiled.Store(cache.folder).save(cache.file().stem, ("not", "a", "kernel"))
    assert not cache.in_a_new_process()
    assert "is damaged" in cache.said[0]


PROGRAM = """
import sys
import numpy as np
from distconv.kernels import compiled
from tests.test_cache import halved_sum
compiled.CACHE.say = print
kernel = compiled.compiled(halved_sum)
assert kernel(np.arange(9.0)) == 18
print("hits", sum(kernel.stats.cache_hits.values()))
"""


def lines(cache: Path, before: str = "", **environment: str) -> list[str]:
    """What a process says that uses the cache; before: a shell command in mounts of its own, as root."""
    environment = {"NUMBA_CACHE_DIR": str(cache), **environment}
    if not before:
        result = python("-c", PROGRAM, **environment)
    else:
        script = f'set -e; {before}; exec "$@"'
        result = subprocess.run(
            ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        if "unshare" in result.stderr or "mount" in result.stderr:
            pytest.skip(f"no mounts of one's own here: {result.stderr.strip()}")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return result.stdout.splitlines()


def test_on_a_full_disk_kernels_are_compiled_and_the_line_says_that_they_are_not_kept(tmp_path: Path) -> None:
    line, hits = lines(tmp_path, f"mount -t tmpfs -o size=4k tmpfs {tmp_path}")
    assert "compiling the kernels" in line and "at every start" in line and "No space left on device" in line
    assert str(tmp_path) in line and "NUMBA_CACHE_DIR" in line and hits == "hits 0"


@pytest.mark.slow
def test_a_cache_that_can_only_be_read_is_read(tmp_path: Path) -> None:
    read_only = f"mount --bind {tmp_path} {tmp_path}; mount -o remount,ro,bind {tmp_path}"
    line, hits = lines(tmp_path, read_only)
    assert "at every start" in line and "Read-only file system" in line and hits == "hits 0"
    assert lines(tmp_path)[-1] == "hits 0"
    assert lines(tmp_path, read_only) == ["hits 1"]


def test_without_a_folder_for_them_kernels_are_compiled_at_every_start() -> None:
    line, hits = lines(Path("/proc/none"))
    assert "at every start" in line and "/proc/none" in line and hits == "hits 0"


@pytest.mark.slow
def test_another_processor_is_told_that_it_compiles(tmp_path: Path) -> None:
    assert len(lines(tmp_path)) == 2 and len(lines(tmp_path)) == 1
    other = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    line, hits = lines(tmp_path, **other)
    assert "compiling the kernels, once" in line and hits == "hits 0"
    assert lines(tmp_path, **other) == ["hits 1"]


@pytest.mark.slow
def test_a_processor_that_casts_no_halves_trains(tmp_path: Path) -> None:
    """LLVM would call a function that is not there."""
    train = ("-m", "distconv.train", *QUICK, "--model", "simpleconvnet", "--epochs", "1", "--out", tmp_path / "run")
    result = jobs.run(0, *train, NUMBA_CPU_NAME="generic")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("threads", ["0", "garbage"])
def test_threads_that_numba_does_not_take_are_one_sentence(threads: str) -> None:
    bench = ("-m", "distconv.bench", "step", "--batch-size", "1", "--repeats", "1")
    assert_one_sentence(jobs.run(0, *bench, NUMBA_NUM_THREADS=threads), 2, f"NUMBA_NUM_THREADS={threads}")


def test_without_a_compiler_it_is_one_sentence(tmp_path: Path) -> None:
    train = ("-m", "distconv.train", *QUICK, "--out", tmp_path / "run")
    assert_one_sentence(jobs.run(0, *train, NUMBA_DISABLE_JIT="1"), 2, "NUMBA_DISABLE_JIT is set")
    assert not (tmp_path / "run").exists()
