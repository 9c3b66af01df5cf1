"""What a gradient looks like on the wire: as bytes of float16, or plainly as float32 or float64.

float16 has 5 bits of exponent, so it holds numbers from 6e-8 to 65504; gradients are often smaller. So each block of
BLOCK numbers is divided by a power of two, chosen from the largest of the block, that brings that one into
[2^14, 2^15), and the exponent travels beside the halves as a 16-bit integer. Nothing overflows, and what vanishes is
2^39 times smaller than the largest of its block. A power of two changes no bit of the mantissa, so the rounding to
float16 (2^-11 relative, at the worst) is the only loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distconv.kernels.cpu import Array

Bytes = NDArray[np.uint8]
BLOCK = 256  # numbers that share an exponent: 0.4 % more bytes
TOP = 15  # the largest of a block is brought into [2^(TOP-1), 2^TOP)
LOWEST, HIGHEST = -126, 127  # exponents whose powers of two, either way, are normal float32 numbers or nearly so


class Wire(Protocol):
    """A format for vectors whose length is a multiple of BLOCK."""

    @property
    def sum_dtype(self) -> np.dtype[Any]:
        """The type in which contributions are added up."""
        ...

    def nbytes(self, n: int) -> int:
        """Bytes for n numbers."""
        ...

    def encode(self, vector: Array, out: Bytes) -> None:
        """Write a vector (n,) into out (nbytes(n),)."""
        ...

    def decode(self, raw: Bytes) -> Array:
        """The vector (n,) that raw (nbytes(n),) stands for, as sum_dtype."""
        ...


@dataclass(frozen=True)
class PlainWire:
    """Numbers as they are, in the byte order of the machine."""

    sum_dtype: np.dtype[Any]

    def nbytes(self, n: int) -> int:
        return n * self.sum_dtype.itemsize

    def encode(self, vector: Array, out: Bytes) -> None:
        out.view(self.sum_dtype)[...] = vector

    def decode(self, raw: Bytes) -> Array:
        return raw.view(self.sum_dtype)


@dataclass(frozen=True)
class HalfWire:
    """n halves, then n / BLOCK exponents. Infinities and NaN stay what they are; so do signed zeros."""

    @property
    def sum_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def nbytes(self, n: int) -> int:
        return 2 * n + 2 * n // BLOCK

    def encode(self, vector: Array, out: Bytes) -> None:
        n = vector.size
        blocks = vector.reshape(-1, BLOCK)
        exponents = block_exponents(blocks)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            scaled = blocks * np.ldexp(np.ones((), vector.dtype), -exponents)[:, None]
            out[: 2 * n].view(np.float16).reshape(blocks.shape)[...] = scaled
        out[2 * n :].view(np.int16)[...] = exponents

    def decode(self, raw: Bytes) -> Array:
        n = len(raw) * BLOCK // (2 * BLOCK + 2)
        blocks = raw[: 2 * n].view(np.float16).reshape(-1, BLOCK).astype(np.float32)
        exponents = raw[2 * n :].view(np.int16).astype(np.int32)
        with np.errstate(over="ignore", under="ignore"):
            blocks *= np.ldexp(np.float32(1), exponents)[:, None]
        return blocks.reshape(n)


def block_exponents(blocks: Array) -> NDArray[np.int32]:
    """For blocks (M, BLOCK), the exponents e (M,) that bring each block's largest |x| 2^-e into [2^14, 2^15).

    0 for a block of zeros and for one that is not finite; never beyond LOWEST and HIGHEST.
    """
    peak = np.abs(blocks).max(axis=1)
    exponents = np.frexp(peak)[1].astype(np.int32) - TOP
    return np.where(np.isfinite(peak) & (peak > 0), np.clip(exponents, LOWEST, HIGHEST), 0)


WIRES: dict[str, Wire] = {
    "float16": HalfWire(),
    "float32": PlainWire(np.dtype(np.float32)),
    "float64": PlainWire(np.dtype(np.float64)),
}
