"""A small language for loops over vectors of floats, inside functions that Numba compiles.

Numba turns loops into vector instructions when LLVM sees fit; it does not keep a tile of sums in registers, on which a
matrix product depends. Here the vectors are explicit: `emitted` makes, of a Python function on Pointers, Indices and
Vectors, an operation that jitted code can call. The Python function runs once, at compile time, and every operation in
it becomes an instruction; its loops and lists are gone by then. LLVM splits the vectors where a CPU has shorter ones.

A vector has as many floats as fill a register of AVX2 or, where Numba may use it, of AVX-512. What depends on LANES
is told apart in Numba's cache as well, which keeps code apart by the same list of features that LANES comes from.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from distconv.kernels.compiled import cpu_features


def has_avx512() -> bool:
    """Whether Numba compiles for AVX-512: the processor has it, or NUMBA_CPU_FEATURES says so of another one."""
    return "+avx512f" in cpu_features().split(",")


LANES = 16 if has_avx512() else 8  # floats of a Vector
LINE = 16  # floats of a cache line
FLOAT = ir.FloatType()
INDEX = ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
BYTES = ir.VectorType(ir.IntType(8), LANES)
FMA = f"llvm.fma.v{LANES}f32"


class Value:
    """An LLVM value of a function under construction."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value


class Vector(Value):
    """LANES floats. The operators take a Vector or a Python float."""

    def _other(self, other: Vector | float) -> ir.Value:
        return other.value if isinstance(other, Vector) else VECTOR([other] * LANES)

    def __add__(self, other: Vector | float) -> Vector:
        return Vector(self.builder, self.builder.fadd(self.value, self._other(other)))

    def __sub__(self, other: Vector | float) -> Vector:
        return Vector(self.builder, self.builder.fsub(self.value, self._other(other)))

    def __mul__(self, other: Vector | float) -> Vector:
        return Vector(self.builder, self.builder.fmul(self.value, self._other(other)))

    def times(self, factor: Vector | float, addend: Vector) -> Vector:
        """self * factor + addend, rounded once."""
        fma = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3), FMA)
        return Vector(self.builder, self.builder.call(fma, [self.value, self._other(factor), addend.value]))

    def at_least(self, floor: Vector) -> Vector:
        """The larger of each pair; not-a-number stays."""
        return self.where(self.builder.fcmp_unordered(">=", self.value, floor.value), floor)

    def where(self, mask: ir.Value, otherwise: Vector) -> Vector:
        return Vector(self.builder, self.builder.select(mask, self.value, otherwise.value))

    def exceeds(self, other: Vector) -> ir.Value:
        """Mask of the elements that are larger than the other's; none where one of the two is not a number."""
        return self.builder.fcmp_ordered(">", self.value, other.value)

    def wins(self, best: Vector) -> ir.Value:
        """Mask of the elements that are larger than the best so far, or not a number, which then stays the best."""
        unordered = self.builder.fcmp_unordered("uno", self.value, self.value)
        return self.builder.or_(self.exceeds(best), unordered)

    def above(self, floor: Vector) -> ir.Value:
        """Mask of the elements that are larger than the floor's, or one of the two is not a number."""
        return self.builder.fcmp_unordered(">", self.value, floor.value)


class Index(Value):
    """A 64-bit integer. The operators take an Index or a Python int."""

    def _other(self, other: Index | int) -> ir.Value:
        return other.value if isinstance(other, Index) else INDEX(other)

    def __add__(self, other: Index | int) -> Index:
        return Index(self.builder, self.builder.add(self.value, self._other(other)))

    def __mul__(self, other: Index | int) -> Index:
        return Index(self.builder, self.builder.mul(self.value, self._other(other)))

    def within(self, size: Index) -> ir.Value:
        """Whether 0 <= self < size."""
        return self.builder.icmp_unsigned("<", self.value, size.value)


class Pointer(Value):
    """Elements of a contiguous array, floats unless it is one of bytes; `p + index` counts in elements."""

    def __add__(self, offset: Index | int) -> Pointer:
        distance = offset.value if isinstance(offset, Index) else INDEX(offset)
        return Pointer(self.builder, self.builder.gep(self.value, [distance]))

    def load(self) -> Vector:
        place = self.builder.bitcast(self.value, VECTOR.as_pointer())
        return Vector(self.builder, self.builder.load(place, align=4))

    def store(self, vector: Vector) -> None:
        place = self.builder.bitcast(self.value, VECTOR.as_pointer())
        self.builder.store(vector.value, place, align=4)

    def spread(self) -> Vector:
        """The one float here, in all lanes."""
        return spread(self.builder, self.builder.load(self.value))

    def index(self) -> Index:
        """The one integer here, of 64 bits."""
        return Index(self.builder, self.builder.load(self.value))

    def where(self, condition: ir.Value, otherwise: Pointer) -> Pointer:
        return Pointer(self.builder, self.builder.select(condition, self.value, otherwise.value))


def spread(builder: ir.IRBuilder, value: ir.Value) -> Vector:
    """The scalar in all lanes."""
    one = builder.insert_element(VECTOR(ir.Undefined), value, ir.IntType(32)(0))
    lanes = ir.VectorType(ir.IntType(32), LANES)
    return Vector(builder, builder.shuffle_vector(one, VECTOR(ir.Undefined), lanes([0] * LANES)))


def scratch(builder: ir.IRBuilder) -> Pointer:
    """Room for one vector on the stack, zero at first; for what lies outside an image."""
    room = cgutils.alloca_once(builder, VECTOR)
    builder.store(VECTOR([0.0] * LANES), room)
    return Pointer(builder, builder.bitcast(room, FLOAT.as_pointer()))


class Bytes(Value):
    """LANES bytes, one beside each lane of a Vector."""

    @classmethod
    def all(cls, builder: ir.IRBuilder, number: int) -> Bytes:
        return cls(builder, BYTES([number] * LANES))

    @classmethod
    def spread(cls, number: Index) -> Bytes:
        """The number, from 0 to 255, in all of them."""
        builder, lanes = number.builder, ir.VectorType(ir.IntType(32), LANES)
        one = builder.insert_element(BYTES(ir.Undefined), builder.trunc(number.value, BYTES.element), ir.IntType(32)(0))
        return cls(builder, builder.shuffle_vector(one, BYTES(ir.Undefined), lanes([0] * LANES)))

    def where(self, mask: ir.Value, otherwise: Bytes) -> Bytes:
        return Bytes(self.builder, self.builder.select(mask, self.value, otherwise.value))

    def equal(self, number: int | Index) -> ir.Value:
        """Mask of the bytes that are this number."""
        other = Bytes.spread(number) if isinstance(number, Index) else Bytes.all(self.builder, number)
        return self.builder.icmp_unsigned("==", self.value, other.value)

    @classmethod
    def load(cls, place: Pointer) -> Bytes:
        at = place.builder.bitcast(place.value, BYTES.as_pointer())
        return cls(place.builder, place.builder.load(at, align=1))

    def store(self, place: Pointer) -> None:
        self.builder.store(self.value, self.builder.bitcast(place.value, BYTES.as_pointer()), align=1)


@contextlib.contextmanager
def repeat(count: Index) -> Iterator[Index]:
    """A loop of the compiled code, for `with`; yields its index."""
    with cgutils.for_range(count.builder, count.value) as loop:
        yield Index(count.builder, loop.index)


Kind = TypeVar("Kind", Vector, Bytes)


class Sum(Generic[Kind]):
    """A Vector, or Bytes, that a loop changes; it lives in a register."""

    def __init__(self, start: Kind) -> None:
        self.builder = start.builder
        self.kind: type[Kind] = type(start)
        self.place = cgutils.alloca_once_value(start.builder, start.value)

    def get(self) -> Kind:
        value: Kind = self.kind(self.builder, self.builder.load(self.place))
        return value

    def set(self, value: Kind) -> None:
        self.builder.store(value.value, self.place)


def zeros(builder: ir.IRBuilder) -> Vector:
    return Vector(builder, VECTOR([0.0] * LANES))


def emitted(emit: Callable[..., None]) -> Callable[..., None]:
    """Make emit(builder, *arguments) callable from jitted code.

    There, an argument is a contiguous array of float32 or uint8 (a Pointer to emit), an integer (an Index) or a float32
    (a Vector with that number in all lanes).
    """

    def typed(typing_context: Any, *kinds: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
            emit(builder, *(_argument(context, builder, *pair) for pair in zip(signature.args, values, strict=True)))
            return context.get_dummy_value()

        return types.void(*kinds), generate

    parameters = list(inspect.signature(emit).parameters.values())
    typed.__signature__ = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])  # type: ignore[attr-defined]
    typed.__name__ = emit.__name__
    operation: Callable[..., None] = intrinsic(typed)
    return operation


def emitted_with(number: int, emit: Callable[..., None]) -> Callable[..., None]:
    """emit(number, builder, *arguments) as an operation for this number, which is known when it is compiled."""
    with_number = functools.partial(emit, number)
    with_number.__name__ = f"{emit.__name__}_{number}"  # type: ignore[attr-defined]
    return emitted(with_number)


def _argument(context: Any, builder: ir.IRBuilder, kind: Any, value: ir.Value) -> Value:
    if isinstance(kind, types.Array):
        return Pointer(builder, context.make_array(kind)(context, builder, value).data)
    if isinstance(kind, types.Float):
        return spread(builder, context.cast(builder, value, kind, types.float32))
    return Index(builder, context.cast(builder, value, kind, types.int64))


def ask(place: Pointer, to_write: int = 0) -> None:
    """Ask for the cache line at a place, which need not exist, without waiting. It comes into the second cache.

    The processor asks for lines by itself, but not across a page, nor for what is to be written, nor soon enough.
    """
    builder, word, byte = place.builder, ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    request = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(request, [builder.bitcast(place.value, byte), *(word(number) for number in (to_write, 2, 1))])


def _prefetch(to_write: int, builder: ir.IRBuilder, x: Pointer, at: Index, lines: Index) -> None:
    """Ask for so many cache lines from x[at] on."""
    with repeat(lines) as line:
        ask(x + at + line * LINE, to_write)


prefetch, prefetch_to_write = (emitted_with(to_write, _prefetch) for to_write in (0, 1))
