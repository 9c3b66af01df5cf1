"""16-bit numbers at the speed of the hardware: the loops of the wire format (distconv/comm/wire.py), compiled by Numba.

NumPy casts to float16 in software, a number at a time: 1031 us for 123,552 numbers. LLVM's `fptrunc` to half becomes
one instruction for 16 numbers (vcvtps2ph): 10 us. Numba has no type for halves, so they are kept as their 16 bits, and
three intrinsics emit the instructions. Everything else is ordinary Numba.

The loops work on slices of one block, of a length that LLVM sees to be free of wrap-around: that is what lets it use
vectors (8 times faster here than the same loop with an offset in its index).
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from distconv.kernels.compiled import compiled, cpu_features
from distconv.kernels.interface import BLOCK

TOP = 15  # the largest of a block is brought into [2^(TOP-1), 2^TOP): below 65504, and far above what vanishes
LOWEST = -126  # exponent whose powers of two, either way, are normal float32 numbers
BIAS = 127  # of a float32's exponent, which stands above MANTISSA bits
MANTISSA = 23
INFINITE = 0x7F800000  # the bits of float32 infinity; a NaN's are larger


def in_hardware() -> bool:
    """Whether the processor casts between float32 and half; where it does not, LLVM would call a missing function."""
    machine = llvmlite.binding.get_process_triple().split("-")[0]
    if machine in ("x86_64", "i686"):
        return "+f16c" in cpu_features().split(",")
    return machine in ("aarch64", "arm64")


@intrinsic
def _narrow_half(typing: Any, x: Any) -> Any:
    """float32 -> the bits of the nearest half, ties to even."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), emit


@intrinsic
def _widen_half(typing: Any, bits: Any) -> Any:
    """The bits of a half -> float32, exactly."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), emit


@intrinsic
def from_bits(typing: Any, bits: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), emit


@intrinsic
def _larger_magnitude(typing: Any, peak: Any, x: Any) -> Any:
    """The larger of peak and the bits of |x|: as whole numbers they are ordered as the numbers are, NaN on top."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32 = ir.IntType(32)
        magnitude = builder.and_(builder.bitcast(arguments[1], i32), ir.Constant(i32, 0x7FFFFFFF))
        return builder.select(builder.icmp_signed(">", magnitude, arguments[0]), magnitude, arguments[0])

    return types.int32(types.int32, types.float32), emit


@compiled
def _power_of_two(exponent: int) -> Any:
    return from_bits(np.int32((BIAS + exponent) << MANTISSA))


@compiled
def peak_bits(x: Any) -> Any:
    """The bits of the largest |x|, INFINITE or more where not all of x is finite."""
    peak = np.int32(0)
    for i in range(x.size):
        peak = _larger_magnitude(peak, x[i])
    return peak


@compiled
def first_bad(x: Any) -> int:
    """Index of the first infinity or NaN of x (n,) float32, or -1; ten times faster than NumPy's isfinite and all."""
    for start in range(0, x.size, BLOCK):
        numbers = x[start : start + BLOCK]
        if peak_bits(numbers) >= INFINITE:
            for i in range(numbers.size):
                if not np.isfinite(numbers[i]):
                    return start + i
    return -1


@compiled
def finite_peak_bits(x: Any) -> Any:
    """The bits of the largest finite |x|."""
    peak = np.int32(0)
    for i in range(x.size):
        if np.isfinite(x[i]):
            peak = _larger_magnitude(peak, x[i])
    return peak


@compiled
def encode(x: Any, halves: Any, exponents: Any) -> bool:
    """Write x (n,) float32 as the bits of halves (n or more,) and of an int16 exponent for each block, all uint16.

    The exponent e of a block brings its largest finite |x| 2^-e into [2^14, 2^15); 0 for a block of zeros. Returns
    whether all of x is finite.
    """
    finite = True
    for block in range((x.size + BLOCK - 1) // BLOCK):
        numbers = x[block * BLOCK : (block + 1) * BLOCK]
        out = halves[block * BLOCK : (block + 1) * BLOCK]
        peak = peak_bits(numbers)
        if peak >= INFINITE:
            finite = False
            peak = finite_peak_bits(numbers)
        exponent = max((peak >> MANTISSA) - (BIAS - 1 + TOP), LOWEST) if peak > 0 else 0
        scale = _power_of_two(-exponent)
        for i in range(numbers.size):
            out[i] = _narrow_half(numbers[i] * scale)
        exponents[block] = np.uint16(exponent)
    return finite


@compiled
def decode(halves: Any, exponents: Any, x: Any) -> None:
    """Write the numbers that halves and exponents stand for into x (n,) float32."""
    for block in range((x.size + BLOCK - 1) // BLOCK):
        numbers = x[block * BLOCK : (block + 1) * BLOCK]
        bits = halves[block * BLOCK : (block + 1) * BLOCK]
        scale = _power_of_two(np.int16(exponents[block]))
        for i in range(numbers.size):
            numbers[i] = _widen_half(bits[i]) * scale


@compiled
def sum_and_encode(
    own: Any, rank: int, P: int, received: Any, first: int, stride: int, capacity: int, halves: Any, exponents: Any
) -> None:
    """Add up the contributions of P ranks in float32, in rank order, and write the sum as halves and exponents.

    own (n,) float32 is that of `rank`, as it is. Those of the others lie in received (uint16, contiguous), `stride`
    apart from `first` on: `capacity` halves, then the exponents. The sum of a block stays in the first cache from the
    first contribution to the last cast.
    """
    total = np.empty(BLOCK, np.float32)
    for block in range((own.size + BLOCK - 1) // BLOCK):
        start, stop = block * BLOCK, min((block + 1) * BLOCK, own.size)
        part = total[: stop - start]
        part[:] = 0
        for other in range(P):
            if other == rank:
                numbers = own[start:stop]
                for i in range(part.size):
                    part[i] += numbers[i]
            else:
                message = received[first + other * stride :]
                bits = message[start:stop]
                scale = _power_of_two(np.int16(message[capacity + block]))
                for i in range(part.size):
                    part[i] += _widen_half(bits[i]) * scale
        encode(part, halves[start:stop], exponents[block : block + 1])
