"""What a gradient looks like on the wire: as float16 with shared exponents, as int8 with shared scales, or as it is.

float16 has 5 bits of exponent, so it holds numbers from 6e-8 to 65504; gradients are often smaller. So each block of
BLOCK numbers is divided by a power of two, chosen from the largest finite one of the block, that brings that one into
[2^14, 2^15), and the exponent travels behind the halves as a 16-bit integer. Nothing overflows but what rounds up to
2^128, and what vanishes is 2^39 times smaller than the largest of its block. A power of two changes no bit of the
mantissa, so the rounding to float16 (2^-11 relative, at the worst) is the only loss. Infinities and NaN stay what they
are, where they are.

int8 is for slow links. A number travels as a whole multiple of its block's scale, and is rounded up or down to it at
random, so that the mean over many roundings is the number itself. The random numbers hang on seed, step, sender and
place, so a run repeats to the bit. kernels/int8.py has the loops, and says what the scale is.

The classes below say what the other formats are, in NumPy; where the processor casts to half itself, kernels/half.py
does the same work at its speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.kernels import half, int8
from distconv.kernels.half import LOWEST, TOP
from distconv.kernels.interface import BLOCK, Array

Bytes = NDArray[np.uint8]
PIECE = 256 * BLOCK  # numbers that NumPy works on at a time: its temporary arrays stay small, and in the cache
ALIGNMENT = 8  # bytes; messages lie behind one another, and each is read as numbers of up to that size


@dataclass(frozen=True)
class Wire:
    """A format for vectors (n,) of one dtype. Messages are arrays of bytes.

    Subclasses say how a piece is written to and read from its place in a message, `start` numbers from the beginning;
    pieces begin at multiples of BLOCK. A wire that rounds at random has random_key's key for the first number.
    """

    name: str
    dtype: np.dtype[Any]  # of the vectors, and of the sums

    def nbytes(self, n: int) -> int:
        """Bytes of a message that holds up to n numbers, n a multiple of BLOCK."""
        return n * self.dtype.itemsize

    def encode_piece(self, x: Array, message: Bytes, start: int, key: int) -> None:
        message.view(self.dtype)[start : start + x.size] = x

    def decode_piece(self, message: Bytes, x: Array, start: int) -> None:
        x[...] = message.view(self.dtype)[start : start + x.size]

    def encode(self, x: Array, message: Bytes, key: int = 0) -> bool:
        """Write x, which may be shorter than the message has room for. Returns whether all of it is finite."""
        for piece in _pieces(x.size):
            self.encode_piece(x[piece], message, piece.start, key + piece.start // BLOCK)
        return self.first_bad(x) < 0

    def decode(self, message: Bytes, x: Array) -> None:
        """Write the numbers of a message into x, which may be shorter."""
        for piece in _pieces(x.size):
            self.decode_piece(message, x[piece], piece.start)

    def round_trip(self, x: Array) -> Array:
        """What arrives of x."""
        message, arrived = np.zeros(self.nbytes(-(-x.size // BLOCK) * BLOCK), np.uint8), np.empty_like(x)
        self.encode(x, message)
        self.decode(message, arrived)
        return arrived

    def warm_up(self) -> None:
        """Call what an exchange calls, so that it is compiled."""
        numbers, message = np.zeros(BLOCK, self.dtype), np.zeros(self.nbytes(BLOCK), np.uint8)
        self.encode(numbers, message)
        self.sum_and_encode(numbers, 0, 2, np.tile(message, 2), 0, len(message), message)
        self.decode(message, numbers)
        self.first_bad(numbers)

    def mark_bad(self, x: Array, header: Any, finite: bool = False) -> None:
        """Write into a header where x is first not finite, or -1; finite: it is known to be."""
        header["bad_at"] = -1 if finite else self.first_bad(x)

    def first_bad(self, x: Array) -> int:
        """Index of the first infinity or NaN of x, or -1."""
        for piece in _pieces(x.size):
            finite = np.isfinite(x[piece])
            if not finite.all():
                return int(piece.start + np.argmin(finite))
        return -1

    def sum_and_encode(
        self, own: Array, rank: int, P: int, received: Bytes, first: int, stride: int, message: Bytes, key: int = 0
    ) -> None:
        """Write the sum of the contributions of P ranks, added up in rank order, into message.

        own is that of `rank`, as it is; those of the others are messages in received, `stride` bytes apart from `first`
        on.
        """
        for piece in _pieces(own.size):
            total, other = np.zeros_like(own[piece]), np.empty_like(own[piece])
            for r in range(P):
                if r == rank:
                    total += own[piece]
                else:
                    self.decode_piece(received[first + r * stride :][: len(message)], other, piece.start)
                    total += other
            self.encode_piece(total, message, piece.start, key + piece.start // BLOCK)


class HalfWire(Wire):
    """float16: halves, then an int16 exponent for each block of them."""

    def nbytes(self, n: int) -> int:
        content = 2 * n + 2 * (n // BLOCK)
        return -(-content // ALIGNMENT) * ALIGNMENT

    def encode_piece(self, x: Array, message: Bytes, start: int, key: int) -> None:
        halves, exponents = _fields(message)
        blocks = _blocks(x)
        e = block_exponents(blocks)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            scaled = blocks * np.ldexp(np.float32(1), -e)[:, None]
            halves[start : start + x.size].view(np.float16)[...] = scaled.ravel()[: x.size]
        exponents[start // BLOCK :][: len(e)].view(np.int16)[...] = e

    def decode_piece(self, message: Bytes, x: Array, start: int) -> None:
        halves, exponents = _fields(message)
        blocks = _blocks(halves[start : start + x.size].view(np.float16).astype(np.float32))
        e = exponents[start // BLOCK :][: len(blocks)].view(np.int16).astype(np.int32)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            x[...] = (blocks * np.ldexp(np.float32(1), e)[:, None]).ravel()[: x.size]


class CompiledHalfWire(HalfWire):
    """The same format by the loops of kernels/half.py."""

    def first_bad(self, x: Array) -> int:
        return int(half.first_bad(x))

    def encode(self, x: Array, message: Bytes, key: int = 0) -> bool:
        return bool(half.encode(x, *_fields(message)))

    def decode(self, message: Bytes, x: Array) -> None:
        half.decode(*_fields(message), x)

    def sum_and_encode(
        self, own: Array, rank: int, P: int, received: Bytes, first: int, stride: int, message: Bytes, key: int = 0
    ) -> None:
        capacity = _capacity(len(message))
        half.sum_and_encode(
            own, rank, P, received.view(np.uint16), first // 2, stride // 2, capacity, *_fields(message)
        )


class Int8Wire(Wire):
    """int8: whole numbers, then the upper half of a float32 scale for each block of them."""

    def nbytes(self, n: int) -> int:
        content = n + 2 * (n // BLOCK)
        return -(-content // ALIGNMENT) * ALIGNMENT

    def encode_piece(self, x: Array, message: Bytes, start: int, key: int) -> None:
        int8.encode(x, *_codes(message, start), np.uint64(key % 2**64))

    def decode_piece(self, message: Bytes, x: Array, start: int) -> None:
        int8.decode(*_codes(message, start), x)

    def first_bad(self, x: Array) -> int:
        return int(half.first_bad(x))


def random_key(seed: int, step: int, sender: int, place: int) -> int:
    """What the random numbers of a block hang on. place: of its first number in the gradient, a multiple of BLOCK.

    The next block's key is 1 more. Odd factors of 64 bits keep those of other seeds, steps and senders away from it.
    """
    return 0x9E3779B97F4A7C15 * seed + 0xD1B54A32D192ED03 * step + 0x8CB92BA72F3D8DD7 * sender + place // BLOCK


def block_exponents(blocks: Array) -> NDArray[np.int32]:
    """For blocks (M, BLOCK), the exponents e (M,) that bring each block's largest finite |x| 2^-e into [2^14, 2^15).

    0 for a block of zeros; never below LOWEST.
    """
    peak = np.abs(np.where(np.isfinite(blocks), blocks, 0)).max(axis=1, initial=0)
    return np.where(peak > 0, np.maximum(np.frexp(peak)[1].astype(np.int32) - TOP, LOWEST), 0)


def _pieces(n: int) -> Iterator[slice]:
    """The parts of a vector (n,) that are worked on one after the other."""
    for start in range(0, n, PIECE):
        yield slice(start, min(start + PIECE, n))


def _capacity(nbytes: int) -> int:
    """Halves that a message of so many bytes has room for, a multiple of BLOCK."""
    return nbytes // (2 * BLOCK + 2) * BLOCK


def _fields(message: Bytes) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """The halves and the exponents of a message, as bits."""
    words, capacity = message.view(np.uint16), _capacity(len(message))
    return words[:capacity], words[capacity:]


def _codes(message: Bytes, start: int) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """The whole numbers and the scales of an int8 message, from number `start` on."""
    capacity = len(message) // (BLOCK + 2) * BLOCK
    return message[start:capacity].view(np.int8), message[capacity:].view(np.uint16)[start // BLOCK :]


def _blocks(x: Array) -> Array:
    """x (n,) -> (M, BLOCK), filled up with zeros."""
    padded = np.zeros(-(-x.size // BLOCK) * BLOCK, x.dtype)
    padded[: x.size] = x
    return padded.reshape(-1, BLOCK)


_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
WIRES: dict[str, Wire] = {
    "float16": (CompiledHalfWire if half.in_hardware() else HalfWire)("float16", _FLOAT32),
    "int8": Int8Wire("int8", _FLOAT32),
    "float32": Wire("float32", _FLOAT32),
    "float64": Wire("float64", _FLOAT64),
}
