"""The IDX file format of MNIST: a magic number, the dimensions, then bytes (http://yann.lecun.com/exdb/mnist/).

The header is held against the size of the file before anything is allocated, so no file can ask for more memory than
it has bytes, and a compressed one not for more than its header declares.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from distconv.errors import BadDataError, MissingInputError, StorageError

UNSIGNED_BYTE = 0x08  # the one element type that MNIST and its successors use
LARGEST = 1 << 31  # bytes of elements; forty times MNIST
KINDS = {1: "labels (1 dimension)", 3: "images (3 dimensions)"}


def read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes with so many dimensions, plain or (by its first bytes) gzip.

    Raises MissingInputError where there is no such file, BadDataError where it is not a whole IDX file of that kind,
    StorageError where it cannot be read.
    """
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise MissingInputError(f"{path} {what}: expected an IDX file, plain or .gz")
    try:
        with path.open("rb") as plain:
            if plain.read(2) != b"\x1f\x8b":
                return _parse(plain, path, dimensions)
        with gzip.open(path, "rb") as unpacked:
            return _parse(unpacked, path, dimensions)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadDataError(f"{path} is a damaged gzip file ({error}): fetch it again") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from None


def _parse(file: IO[bytes] | gzip.GzipFile, path: Path, dimensions: int) -> NDArray[np.uint8]:
    file.seek(0)
    magic = file.read(4)
    wanted = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if magic != wanted:
        found = f"the magic number {magic.hex() or 'nothing'}"
        if magic[:3] == wanted[:3] and magic[3:] in [bytes([kind]) for kind in KINDS]:
            found = f"{KINDS[magic[3]]}, so the files may be swapped"
        raise BadDataError(f"{path} has {found}, but {KINDS[dimensions]} with magic {wanted.hex()} were expected")
    header = file.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        raise BadDataError(f"{path} ends within its header: fetch it again")
    shape = struct.unpack(f">{dimensions}I", header)
    size = math.prod(shape)
    if not 0 < size <= LARGEST:
        raise BadDataError(f"{path} declares the shape {shape}, {size} bytes; 1 to {LARGEST} bytes can be read")
    # A plain file is held against its own size first: to read is to allocate. gzip allocates as it unpacks.
    plain_size = None if isinstance(file, gzip.GzipFile) else os.fstat(file.fileno()).st_size - file.tell()
    body = b"" if plain_size not in (None, size) else file.read(size + 1)  # a longer file is as wrong as a shorter one
    if len(body) != size:
        there = len(body) if plain_size is None else plain_size
        have = "more" if there > size else f"{there}"
        raise BadDataError(f"{path} declares the shape {shape}, {size} bytes, but holds {have}: fetch it again")
    return np.frombuffer(body, np.uint8).reshape(shape)
