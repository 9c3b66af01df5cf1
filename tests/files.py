"""Files that tests read: IDX written from the description of the format, and web servers that give such files."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Collection, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer

import numpy as np

from distconv.data.dataset import Dataset

ROOT = Path(__file__).parent.parent
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
Arrays = dict[str, np.ndarray]


def idx_bytes(array: np.ndarray) -> bytes:
    """Two zeros, 8 for unsigned bytes, the number of dimensions, each of them big-endian, the elements."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def sha256(array: np.ndarray) -> str:
    """Of the IDX file that holds the array, unpacked."""
    return hashlib.sha256(idx_bytes(array)).hexdigest()


def small_set(train: int = 6, test: int = 4, height: int = 5, width: int = 4, seed: int = 0) -> Arrays:
    """A data set in MNIST's form, by file name."""
    random = np.random.default_rng(seed)
    arrays: Arrays = {}
    for name, count in zip(NAMES, (train, train, test, test), strict=True):
        shape, end = ((count, height, width), 256) if "images" in name else ((count,), 10)
        arrays[name] = random.integers(0, end, shape, np.uint8)
    return arrays


def write_set(folder: Path, arrays: Mapping[str, np.ndarray], packed: Collection[str] = ()) -> Path:
    """Write the arrays as IDX files; those in `packed` as .gz."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        if name in packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (folder / name).write_bytes(idx_bytes(array))
    return folder


def assert_holds(dataset: Dataset, arrays: Arrays) -> None:
    """The data set has what these files hold, and a channel axis."""
    images, labels, test_images, test_labels = arrays.values()
    np.testing.assert_array_equal(dataset.train_images, images[..., np.newaxis])
    np.testing.assert_array_equal(dataset.train_labels, labels)
    np.testing.assert_array_equal(dataset.test_images, test_images[..., np.newaxis])
    np.testing.assert_array_equal(dataset.test_labels, test_labels)


def peak_memory(action: Callable[[], object]) -> int:
    """The most bytes that Python and NumPy held at a time for an action, besides what they held before."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter from the root of the checkout."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


class Mirror(ThreadingTCPServer):
    """A web server on this machine that serves each of its files as `answer(request, content)` does: a context manager.

    asked: the names asked for so far. closing: set when the `with` is left, for answers that wait.
    """

    def __init__(self, files: Mapping[str, bytes], answer: Answer) -> None:
        self.files = files
        self.answer = answer
        self.asked: list[str] = []
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"

    def __enter__(self) -> Mirror:
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()  # joins the threads of all requests

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left is no news."""


class Request(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        self.name = self.path.lstrip("/")
        self.server.asked.append(self.name)
        self.server.answer(self, self.server.files[self.name])

    def reply(self, content: bytes, status: int = 200, length: int | None = None) -> None:
        """Send the content, under a Content-Length that may be wrong."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, *arguments: object) -> None:
        """Nothing on standard error."""


Answer = Callable[[Request, bytes], object]
good: Answer = Request.reply


def silent(request: Request, content: bytes) -> None:
    request.server.closing.wait(30)


def stalling(request: Request, content: bytes) -> None:
    request.reply(content[:20], length=len(content))
    request.server.closing.wait(30)


def altered(request: Request, content: bytes) -> None:
    """A whole IDX file, but another one."""
    content = gzip.decompress(content)
    request.reply(gzip.compress(content[:-1] + bytes([content[-1] ^ 1])))


BAD_ANSWERS: dict[str, Answer] = {
    "not found": lambda request, content: request.reply(b"", 404),
    "failing": lambda request, content: request.reply(content, 500),
    "a page that says 200": lambda request, content: request.reply(b"<!DOCTYPE html><title>Sign in</title>"),
    "cut short": lambda request, content: request.reply(content[:-9], length=len(content)),
    "cut short and unaware": lambda request, content: request.reply(content[:-9]),
    "empty": lambda request, content: request.reply(b""),
    "altered": altered,
    "hanging up": lambda request, content: None,
    "silent": silent,
    "stalling": stalling,
}
