"""The IDX reader: right arrays from right files, one sentence for every other, and never more memory than is due."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distconv.data import idx
from distconv.errors import BadDataError, DistconvError, MissingInputError
from tests.files import idx_bytes, peak_memory

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
LABELS = IMAGES[:, 0, 0]
GOOD = idx_bytes(IMAGES)
PACKED = gzip.compress(GOOD, mtime=0)
MIB = 1 << 20


def plain(content: bytes) -> bytes:
    return content


def refused(path: Path, content: bytes, dimensions: int = 3) -> str:
    """Write the content, see it refused as bad data with the file's name, return the sentence."""
    path.write_bytes(content)
    with pytest.raises(BadDataError) as caught:
        idx.read(path, dimensions)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("pack", [plain, gzip.compress])
@pytest.mark.parametrize("array", [IMAGES, LABELS, IMAGES[:1, :1, :1]])
def test_what_was_written_is_read(tmp_path: Path, array: np.ndarray, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "any-name"  # plain or packed is seen in the content
    path.write_bytes(pack(idx_bytes(array)))
    np.testing.assert_array_equal(idx.read(path, array.ndim), array, strict=True)


def test_a_real_file_is_read_byte_for_byte() -> None:
    path = Path(idx.__file__).parent / "optdigits-images-idx3-ubyte.gz"
    assert idx_bytes(idx.read(path, 3)) == gzip.decompress(path.read_bytes())


def test_a_gzip_file_may_have_several_members(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(GOOD[:30]) + gzip.compress(GOOD[30:]))
    np.testing.assert_array_equal(idx.read(path, 3), IMAGES)


@pytest.mark.parametrize("pack", [plain, gzip.compress])
@pytest.mark.parametrize("length", range(16))
def test_a_file_that_ends_within_its_header_is_refused(
    tmp_path: Path, length: int, pack: Callable[[bytes], bytes]
) -> None:
    refused(tmp_path / "images", pack(GOOD[:length]))


@pytest.mark.parametrize("pack", [plain, gzip.compress])
@pytest.mark.parametrize(
    "content",
    [
        GOOD[:-1],
        GOOD + b"\0",
        GOOD + GOOD,
        GOOD[:16],
        b"\x01" + GOOD[1:],
        b"\0\x01" + GOOD[2:],
        b"\0\0\x09" + GOOD[3:],  # signed bytes
        b"\0\0\x0d" + GOOD[3:],  # float32
        b"\0\0\x08\x00" + GOOD[4:],
        b"\0\0\x08\x04" + GOOD[4:],
        b"\x03\x08\0\0" + GOOD[4:],  # little-endian
        b"<!DOCTYPE html><title>404</title>",
        bytes(100),
    ],
    ids=lambda content: content[:6].hex() + f"-{len(content)}",
)
def test_a_file_with_a_wrong_header_or_length_is_refused(
    tmp_path: Path, content: bytes, pack: Callable[[bytes], bytes]
) -> None:
    refused(tmp_path / "images", pack(content))


def test_swapped_images_and_labels_are_called_swapped(tmp_path: Path) -> None:
    assert "may be swapped" in refused(tmp_path / "labels", GOOD, dimensions=1)
    assert "may be swapped" in refused(tmp_path / "images", idx_bytes(LABELS), dimensions=3)


@pytest.mark.parametrize("pack", [plain, gzip.compress])
@pytest.mark.parametrize(
    "shape",
    [
        (2**31 - 1, 2**31 - 1, 2**31 - 1),
        (2**32 - 1, 2**32 - 1, 2**32 - 1),
        (2**32 - 1, 1, 1),
        (2**22, 2**21, 2**21),  # 2^64: nothing, in 64 bits
        (0, 5, 3),
        (7, 0, 3),
        (7, 5, 0),
    ],
)
def test_impossible_dimensions_are_refused_before_anything_is_allocated(
    tmp_path: Path, shape: tuple[int, ...], pack: Callable[[bytes], bytes]
) -> None:
    content = pack(GOOD[:4] + struct.pack(">3I", *shape) + GOOD[16:])
    assert peak_memory(lambda: refused(tmp_path / "images", content)) < MIB


def test_a_small_file_gets_no_memory_for_what_it_only_declares(tmp_path: Path) -> None:
    content = GOOD[:4] + struct.pack(">3I", 2047, 1024, 1024) + b"four"  # just below the largest that is read
    assert peak_memory(lambda: refused(tmp_path / "images", content)) < MIB


def test_a_gzip_bomb_gets_no_memory_beyond_what_its_header_declares(tmp_path: Path) -> None:
    bomb = gzip.compress(GOOD + bytes(64 * MIB), compresslevel=1)
    assert len(bomb) < MIB
    assert peak_memory(lambda: refused(tmp_path / "images.gz", bomb)) < 2 * MIB


def test_a_truncated_gzip_file_is_refused(tmp_path: Path) -> None:
    for length in range(2, len(PACKED)):
        refused(tmp_path / "images.gz", PACKED[:length])


def test_a_flipped_bit_in_the_body_of_a_gzip_file_is_refused(tmp_path: Path) -> None:
    for place in range(10, len(PACKED)):  # the ten bytes before hold a time and the like, not content
        damaged = bytearray(PACKED)
        damaged[place] ^= 1 << place % 8
        refused(tmp_path / "images.gz", bytes(damaged))


@pytest.mark.timeout(10)  # a FIFO that is opened waits for a writer for ever
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path), lambda path: None])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "images"
    make(path)
    with pytest.raises(MissingInputError, match=str(path)):
        idx.read(path, 3)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "images"


def read_or_refuse(path: Path, content: bytes) -> None:
    """Whatever the content: an error of distconv's, or an array that is exactly what the file holds."""
    path.write_bytes(content)
    try:
        array = idx.read(path, 3)
    except DistconvError:
        return
    assert array.dtype == np.uint8
    assert idx_bytes(array) == (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([b"", GOOD[:4], b"\x1f\x8b", PACKED[:10]]))
@example(GOOD[4:], GOOD[:4])
def test_any_bytes_are_read_or_refused(scratch: Path, content: bytes, start: bytes) -> None:
    read_or_refuse(scratch, start + content)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([GOOD, PACKED]),
    st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 3), st.binary(max_size=3)), max_size=3),
)
@example(PACKED, [])
def test_good_files_with_bytes_cut_out_and_put_in_are_read_or_refused(
    scratch: Path, content: bytes, edits: list[tuple[int, int, bytes]]
) -> None:
    for place, cut, put in edits:
        content = content[:place] + put + content[place + cut :]
    read_or_refuse(scratch, content)
