"""A pickle is a program. This is an interpreter for the few instructions of which dicts of arrays are made.

Python's own unpickler can be told which names to refuse, but not to keep to the size of the file: some hundred bytes
make it hash a tuple for hours or take all memory. Here an instruction makes one small object at most, keys are texts,
arrays are views of the file, and no code runs but that of this file. So time and memory grow with the file and no
faster: about three times its size, and some MiB.
"""

from __future__ import annotations

import functools
import math
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from distconv.kernels.interface import Array

MOST_INSTRUCTIONS = 10_000  # an array takes about 30
MOST_DIMENSIONS = 32
LONG_TEXT = 100  # bytes; a longer one is an array's numbers, as older protocols write them: characters of one byte
ADMITTED_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")


class RefusedError(Exception):
    """A program that makes something else than dicts of arrays; says what it asked for."""


@dataclass(frozen=True)
class Name:
    """Something of a module, by its name alone."""

    module: str
    name: str


class PickledDtype:
    """What stands for numpy.dtype."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype


class PickledArray:
    """What stands for numpy.ndarray: without an array until its numbers have come."""

    def __init__(self) -> None:
        self.array: Array | None = None

    @functools.cached_property
    def is_finite(self) -> bool:
        """Whether it has numbers and all are real and finite; looked at once, under however many names it is saved."""
        return self.array is not None and self.array.dtype.kind in "fiu" and bool(np.isfinite(self.array).all())


class Machine:
    """The state of a program: a stack with marks, a memo, and how far it has come."""

    def __init__(self, program: bytes) -> None:
        self.program, self.at = program, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.room = 3 * len(program)  # two for a byte that is copied, one for a byte of an array

    def run(self) -> Any:
        """Run the program and return what it makes: None, bools, numbers, texts, bytes, tuples, lists, dicts, or one of
        the classes above. Raises RefusedError, or what Python raises for values that do not fit an instruction.
        """
        for _ in range(MOST_INSTRUCTIONS):
            code = bytes(self.take(1))
            if code == b".":
                return self.pop()
            if code not in INSTRUCTIONS:
                raise RefusedError(f"it has the instruction {NAMES.get(code, code)}, which no dict of arrays needs")
            INSTRUCTIONS[code](self)
        raise RefusedError(f"it has more than {MOST_INSTRUCTIONS:,} instructions")

    def take(self, count: int) -> memoryview:
        """The next bytes of the program."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.program):
            raise RefusedError("it ends in the middle of an instruction")
        return memoryview(self.program)[start : self.at]

    def whole(self, size: int) -> int:
        """A number of so many bytes that is not negative."""
        return int.from_bytes(self.take(size), "little")

    def line(self) -> memoryview:
        end = self.program.find(b"\n", self.at)
        line = self.take(max(0, end - self.at))
        self.take(1)
        return line

    def word(self) -> str:
        """A short line: a name or a number."""
        line = self.line()
        if len(line) > LONG_TEXT:
            raise RefusedError("it has a name or a number of a great length")
        return str(line, "ascii")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise RefusedError("it takes a value where there is none")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.push(value)
        return value

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise RefusedError("it goes back to a mark where there is none")
        height = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values

    def recall(self, place: int) -> None:
        if place not in self.memo:
            raise RefusedError("it recalls what it has not remembered")
        self.push(self.memo[place])

    def spend(self, count: int) -> None:
        """Count bytes that are made or looked at, so that the same are not again and again."""
        self.room -= count
        if self.room < 0:
            raise RefusedError("it makes more of its bytes than they are")

    def reduce(self) -> None:
        """Call what a name stands for."""
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, Name) or name not in CALLS or not isinstance(arguments, tuple):
            raise RefusedError("it calls what is not to be called")
        self.push(CALLS[name](self, *arguments))

    def build(self) -> None:
        """Give an array or a dtype the state that it was saved with."""
        state, value = self.pop(), self.top()
        if not isinstance(state, tuple) or len(state) < 5:
            raise RefusedError("it gives a state that is none of an array")
        if isinstance(value, PickledDtype) and state[1] in ("<", ">", "|", "="):
            value.dtype = value.dtype.newbyteorder(state[1])
        elif isinstance(value, PickledArray) and len(state) == 5:
            _, shape, dtype, is_fortran, numbers = state
            value.array = self.array(numbers, dtype, shape, "F" if is_fortran else "C")
        else:
            raise RefusedError(f"it gives a state to a {type(value).__name__}")

    def array(self, numbers: Any, kind: Any, shape: Any, order: Any) -> Array:
        if not isinstance(numbers, (bytes, memoryview)) or not isinstance(kind, PickledDtype):
            raise RefusedError("an array is not made of the bytes of numbers")
        if not isinstance(shape, tuple) or len(shape) > MOST_DIMENSIONS or not all(type(n) is int for n in shape):
            raise RefusedError("an array has no shape")
        if min(shape, default=0) < 0 or math.prod(shape) * kind.dtype.itemsize != len(numbers):
            raise RefusedError("an array has not as many numbers as its shape")
        self.spend(len(numbers))
        return np.ndarray(shape, kind.dtype, numbers, order="F" if order == "F" else "C")


def make_dtype(machine: Machine, kind: Any, align: Any = False, copy: Any = True) -> PickledDtype:
    if not isinstance(kind, str) or kind not in ADMITTED_NUMBERS:
        shown = repr(kind[:20]) if isinstance(kind, str) else f"a {type(kind).__name__}"
        raise RefusedError(f"numbers of type {shown} are not admitted")
    return PickledDtype(np.dtype(kind))


def begin_array(machine: Machine, kind: Any, shape: Any, code: Any) -> PickledArray:
    """As protocols 0 to 4 begin one."""
    return PickledArray()


def make_array(machine: Machine, numbers: Any, kind: Any, shape: Any, order: Any) -> PickledArray:
    """A whole one, as protocol 5 has it."""
    result = PickledArray()
    result.array = machine.array(numbers, kind, shape, order)
    return result


def encode(machine: Machine, text: Any, encoding: Any) -> bytes:
    """How older protocols write bytes: as latin-1 text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise RefusedError("bytes in another encoding than latin1 are not admitted")
    machine.spend(2 * len(text))
    return text.encode("latin-1")


CALLS: dict[Name, Callable[..., Any]] = {
    Name("numpy", "dtype"): make_dtype,
    Name("collections", "OrderedDict"): lambda machine: {},
    Name("_codecs", "encode"): encode,
    **{Name(f"numpy.{core}.multiarray", "_reconstruct"): begin_array for core in ("core", "_core")},
    **{Name(f"numpy.{core}.numeric", "_frombuffer"): make_array for core in ("core", "_core")},
}
NAMES_ADMITTED = {*CALLS, Name("numpy", "ndarray")}


def push_name(machine: Machine, module: Any, name: Any) -> None:
    if not isinstance(module, str) or not isinstance(name, str):
        raise RefusedError("it asks for a name that is no text")
    found = Name(module, name)
    if found not in NAMES_ADMITTED:
        raise RefusedError(f"it asks for {module[:60]}.{name[:60]}, which is not admitted")
    machine.push(found)


def push_text(machine: Machine, raw: memoryview, encoding: str) -> None:
    """A character beyond latin-1 would make a long text two or four times as large."""
    if len(raw) > LONG_TEXT:
        wide = np.frombuffer(raw, np.uint8).max() > 0xC3 if encoding == "utf-8" else re.search(rb"\\u(?!00)|\\U", raw)
        if wide:
            raise RefusedError("it has a long text that is not the bytes of an array")
    machine.push(str(raw, encoding, "surrogatepass" if encoding == "utf-8" else "strict"))


def push_number(machine: Machine, word: str) -> None:
    """In protocols 0 and 1, 00 and 01 are False and True."""
    machine.push(word == "01" if word in ("00", "01") else int(word.removesuffix("L")))


def push_long(machine: Machine) -> None:
    size = machine.whole(1)
    if size > 8:
        raise RefusedError("it has a number of more than 64 bits")
    machine.push(int.from_bytes(machine.take(size), "little", signed=True))


def set_items(target: Any, flat: list[Any]) -> None:
    """Put keys and values, one after the other, into a dict."""
    if not isinstance(target, dict):
        raise RefusedError(f"it puts items into a {type(target).__name__}")
    if len(flat) % 2:
        raise RefusedError("it has a name without a value")
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        if not isinstance(key, str):
            raise RefusedError(f"it has a {type(key).__name__} for a name, but 'W1', 'b1', ... were expected")
        target[key] = value


def make_dict(machine: Machine) -> None:
    values = machine.pop_to_mark()
    machine.push({})
    set_items(machine.top(), values)


def set_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    set_items(machine.top(), [key, value])


def set_marked_items(machine: Machine) -> None:
    values = machine.pop_to_mark()
    set_items(machine.top(), values)


def extend(machine: Machine, values: list[Any]) -> None:
    target = machine.top()
    if not isinstance(target, list):
        raise RefusedError(f"it puts items into a {type(target).__name__}")
    target += values


def push_tuple(machine: Machine, count: int) -> None:
    machine.push(tuple([machine.pop() for _ in range(count)][::-1]))


def put(machine: Machine, place: int) -> None:
    machine.memo[place] = machine.top()


NAMES = {code.code.encode("latin-1"): code.name for code in pickletools.opcodes}
_OF_NAMES: dict[str, Callable[[Machine], object]] = {
    "PROTO": lambda m: m.take(1),
    "FRAME": lambda m: m.take(8),
    "NONE": lambda m: m.push(None),
    "NEWTRUE": lambda m: m.push(True),
    "NEWFALSE": lambda m: m.push(False),
    "BININT": lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),
    "BININT1": lambda m: m.push(m.whole(1)),
    "BININT2": lambda m: m.push(m.whole(2)),
    "LONG1": push_long,
    "INT": lambda m: push_number(m, m.word()),
    "LONG": lambda m: push_number(m, m.word()),
    "FLOAT": lambda m: m.push(float(m.word())),
    "BINFLOAT": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    "SHORT_BINBYTES": lambda m: m.push(m.take(m.whole(1))),
    "BINBYTES": lambda m: m.push(m.take(m.whole(4))),
    "BINBYTES8": lambda m: m.push(m.take(m.whole(8))),
    "BYTEARRAY8": lambda m: m.push(m.take(m.whole(8))),
    "SHORT_BINUNICODE": lambda m: push_text(m, m.take(m.whole(1)), "utf-8"),
    "BINUNICODE": lambda m: push_text(m, m.take(m.whole(4)), "utf-8"),
    "BINUNICODE8": lambda m: push_text(m, m.take(m.whole(8)), "utf-8"),
    "UNICODE": lambda m: push_text(m, m.line(), "raw-unicode-escape"),
    "MARK": lambda m: m.marks.append(len(m.stack)),
    "TUPLE": lambda m: m.push(tuple(m.pop_to_mark())),
    "EMPTY_TUPLE": lambda m: m.push(()),
    "TUPLE1": lambda m: push_tuple(m, 1),
    "TUPLE2": lambda m: push_tuple(m, 2),
    "TUPLE3": lambda m: push_tuple(m, 3),
    "LIST": lambda m: m.push(m.pop_to_mark()),
    "EMPTY_LIST": lambda m: m.push([]),
    "APPEND": lambda m: extend(m, [m.pop()]),
    "APPENDS": lambda m: extend(m, m.pop_to_mark()),
    "DICT": make_dict,
    "EMPTY_DICT": lambda m: m.push({}),
    "SETITEM": set_item,
    "SETITEMS": set_marked_items,
    "GLOBAL": lambda m: push_name(m, m.word(), m.word()),
    "STACK_GLOBAL": lambda m: push_name(m, *[m.pop() for _ in range(2)][::-1]),
    "REDUCE": lambda m: m.reduce(),
    "BUILD": lambda m: m.build(),
    "PUT": lambda m: put(m, int(m.word())),
    "BINPUT": lambda m: put(m, m.whole(1)),
    "LONG_BINPUT": lambda m: put(m, m.whole(4)),
    "MEMOIZE": lambda m: put(m, len(m.memo)),
    "GET": lambda m: m.recall(int(m.word())),
    "BINGET": lambda m: m.recall(m.whole(1)),
    "LONG_BINGET": lambda m: m.recall(m.whole(4)),
}
INSTRUCTIONS = {code: _OF_NAMES[name] for code, name in NAMES.items() if name in _OF_NAMES}
