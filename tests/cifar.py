"""Small sets in CIFAR-10's two forms, written from the description of the format."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distconv.data import cifar
from distconv.data.dataset import Dataset

TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
ARCHIVE = "cifar-10-binary.tar.gz"
Files = dict[str, bytes]
# A label and 32 x 32 bytes of red, of green and of blue an image; another number of images in each batch.
RECORDS = {
    batch: np.random.default_rng(n).integers(0, 256, (3 + n, 3073), np.uint8)
    for n, batch in enumerate([*TRAIN, "test_batch"])
}
for records in RECORDS.values():
    records[:, 0] %= 10


def binary(records: Mapping[str, np.ndarray] = RECORDS) -> Files:
    names = "\n".join(cifar.CLASSES) + "\n\n"  # as the official file ends
    return {**{f"{batch}.bin": array.tobytes() for batch, array in records.items()}, "batches.meta.txt": names.encode()}


def python(dump: Callable[[Any], bytes]) -> Files:
    """The python form, its dicts with keys of bytes written by a function."""
    packed = {
        batch: dump({b"batch_label": batch.encode(), b"labels": array[:, 0].tolist(), b"data": array[:, 1:].copy(),
                     b"filenames": [b"%04d.png" % n for n in range(len(array))]})
        for batch, array in RECORDS.items()
    }  # fmt: skip
    names = [name.encode() for name in cifar.CLASSES]
    return {**packed, "batches.meta": dump({b"num_cases_per_batch": 10000, b"label_names": names, b"num_vis": 3072})}


def by_python_2(value: Any) -> bytes:
    """What cPickle of Python 2 writes by protocol 2: str by U and T, all of it put into the memo."""
    places = 0

    def put(code: bytes) -> bytes:
        nonlocal places
        places += 1
        return code + (b"q" + bytes([places]) if places < 256 else b"r" + struct.pack("<I", places))

    def write(value: Any) -> bytes:
        if isinstance(value, bytes):
            return put(b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T%b%b" % (length(value), value))
        if isinstance(value, int):
            return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)
        if isinstance(value, list):
            return put(b"]") + b"(" + b"".join(map(write, value)) + b"e"
        if isinstance(value, dict):
            items = b"".join(write(key) + write(item) for key, item in value.items())
            return put(b"}") + b"(" + items + b"u"
        begun = put(b"cnumpy.core.multiarray\n_reconstruct\n") + put(b"cnumpy\nndarray\n")
        dtype = put(b"cnumpy\ndtype\n") + write(b"u1") + b"K\x00K\x01\x87R(K\x03" + write(b"|")
        dtype += b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
        shape = b"".join(map(write, value.shape)) + b"\x86"
        numbers = b"T" + length(value.tobytes()) + value.tobytes()
        return (
            put(begun + b"K\x00\x85" + write(b"b") + b"\x87R") + b"(K\x01" + shape + dtype + b"\x89" + numbers + b"tb"
        )

    def length(content: bytes) -> bytes:
        return struct.pack("<i", len(content))

    return b"\x80\x02" + write(value) + b"."


def as_text(value: Any) -> Any:
    """The dict with keys and names of text, as people save it again by Python 3."""
    if isinstance(value, dict):
        return {key.decode(): as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_text(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value


FORMS: dict[str, Files] = {
    "binary": binary(),
    "Python 2": python(by_python_2),
    **{f"protocol {n}": python(lambda value, n=n: pickle.dumps(value, n)) for n in (2, 5)},  # type: ignore[misc]
    "text": python(lambda value: pickle.dumps(as_text(value), 2)),
}


def write(folder: Path, content: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / name).write_bytes(text)
    return folder


def archive(content: Mapping[str, bytes], prefix: str = "cifar-10-batches-bin/", *odd: tarfile.TarInfo) -> bytes:
    """A .tar.gz of these files, and of odd members before them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for member in odd:
            tar.addfile(member)
        for name, text in content.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return file.getvalue()


def assert_holds(dataset: Dataset) -> None:
    """The data set is that of RECORDS, by the description of the format, a pixel after the other."""
    for batches, images, labels in (
        (TRAIN, dataset.train_images, dataset.train_labels),
        (["test_batch"], dataset.test_images, dataset.test_labels),
    ):
        records = np.concatenate([RECORDS[batch] for batch in batches])
        assert labels.tolist() == [record[0] for record in records]
        assert images.shape == (len(records), 32, 32, 3) and images.dtype == np.uint8
        for h, w, c in np.ndindex(32, 32, 3):
            assert np.array_equal(images[:, h, w, c], records[:, 1 + 1024 * c + 32 * h + w])
    assert dataset.class_names == cifar.CLASSES and dataset.classes == 10


def changed(**parts: bytes | None) -> Files:
    """The binary form with some files changed, or (None) left out."""
    given = {"batches.meta.txt" if name == "meta" else f"{name}.bin": text for name, text in parts.items()}
    return {name: text for name, text in {**binary(), **given}.items() if text is not None}


ONE = RECORDS["data_batch_1"].tobytes()
WHOLE = archive(binary())
