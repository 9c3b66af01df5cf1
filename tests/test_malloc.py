"""What the process asks of glibc's malloc."""

from __future__ import annotations

import ctypes
import sys

import pytest

from distconv.process.malloc import zeroed_memory

SIZE, PIECES = 4608, 200


def taken(libc: ctypes.CDLL) -> bytes:
    """What many new pieces of memory hold, where as many full ones were given back."""
    full = [libc.malloc(SIZE) for _ in range(PIECES)]
    for piece in full:
        ctypes.memset(piece, 0xAB, SIZE)
    for piece in full[::2]:  # so that they do not become one large piece
        libc.free(piece)
    new = [libc.malloc(SIZE) for _ in full[::2]]
    held = b"".join(ctypes.string_at(piece, SIZE) for piece in new)
    for piece in (*full[1::2], *new):
        libc.free(piece)
    return held


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_new_memory_is_zero_within_the_block_only() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("needs glibc")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    assert 0xAB in taken(libc)
    with zeroed_memory():
        assert not any(taken(libc))
    assert 0xAB in taken(libc)
