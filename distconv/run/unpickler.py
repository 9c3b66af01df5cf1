"""Pickled dicts of arrays, read by Python's own unpickler, while nothing runs that the file names.

A pickle is a program. Its instructions are looked at first: only some kinds are admitted, long bytes are not used
twice, and tuples neither, as some hundred bytes of tuples within tuples take hours to hash. Then the unpickler runs
them, and each name that they ask for is a class of this file. So time and memory grow with the file and no faster: a
dict of arrays takes two to five times its size, the worst file eight times and some MiB.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

import numpy as np

from distconv.kernels.interface import Array

MOST_INSTRUCTIONS = 10_000  # an array takes about 50
LONG_TEXT = 100  # characters or bytes; a longer one is an array's numbers, as older protocols write them
TEXTS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
SCALARS = {"NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "BINFLOAT"}
TUPLES = {"MARK", "TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
COLLECTIONS = {"LIST", "EMPTY_LIST", "APPEND", "APPENDS", "DICT", "EMPTY_DICT", "SETITEM", "SETITEMS"}
PUTS, GETS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}  # of the unpickler's memo
REUSABLE = TEXTS | BYTES | {"GLOBAL", "STACK_GLOBAL", "REDUCE"}  # what makes a thing that may be used again
ADMITTED = REUSABLE | SCALARS | TUPLES | COLLECTIONS | PUTS | GETS | {"PROTO", "FRAME", "BUILD", "STOP"}


class StandIn:
    """What a name stands for. Without a __setstate__ here, the unpickler would set attributes as the file says."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"it gives a state to a {type(self).__name__}")


class PickledDict(StandIn, dict[Any, Any]):
    def __init__(self) -> None:
        super().__init__()


class PickledBytes(StandIn, bytes):
    """Older protocols write bytes as latin-1 text."""

    def __new__(cls, text: str, encoding: str) -> PickledBytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError("bytes in another encoding than latin1 are not admitted")
        return super().__new__(cls, text, "latin-1")


class PickledDtype(StandIn):
    def __init__(self, kind: Any, align: Any, copy: Any) -> None:
        self.floats = np.dtype(kind) if isinstance(kind, str) and kind in ("f2", "f4", "f8") else None

    def __setstate__(self, state: Any) -> None:
        if self.floats is not None and state[1] in ("<", ">"):
            self.floats = self.floats.newbyteorder(state[1])


class PickledArray(StandIn):
    """Without an array until its floats have come. Protocols 0 to 4 give them as a state, protocol 5 at once."""

    def __init__(self, *arguments: Any) -> None:
        self.array: Array | None = None
        if len(arguments) > 3:
            self.fill(*arguments)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, numbers = state
        self.fill(numbers, dtype, shape, "F" if is_fortran else "C")

    def fill(self, numbers: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> None:
        """View the bytes as an array; raises ValueError or TypeError where they do not fit the shape."""
        if isinstance(dtype, PickledDtype) and dtype.floats is not None:
            array = np.frombuffer(numbers, dtype.floats).reshape(shape, order="F" if order == "F" else "C")
            self.array = array if axes is None else array.transpose(axes)


STAND_INS: dict[str, type[StandIn]] = {
    "numpy.dtype": PickledDtype,
    "numpy.ndarray": StandIn,
    "collections.OrderedDict": PickledDict,
    "_codecs.encode": PickledBytes,
    **{f"numpy.{core}.multiarray._reconstruct": PickledArray for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": PickledArray for core in ("core", "_core")},
}


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[StandIn]:
        if f"{module}.{name}" not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'[:100]!r}, which is not admitted")
        return STAND_INS[f"{module}.{name}"]


def check_instructions(program: bytes) -> None:
    """Raises UnpicklingError for what no dict of arrays needs, ValueError for a broken or cut off program."""
    reusable: dict[Any, bool] = {}  # by place in the memo
    last_is_reusable = False
    for count, (instruction, argument, _) in enumerate(pickletools.genops(program)):
        name = instruction.name
        place: Any = len(reusable) if name == "MEMOIZE" else argument
        if name not in ADMITTED:
            raise pickle.UnpicklingError(f"it has the instruction {name}, which no dict of arrays needs")
        if count >= MOST_INSTRUCTIONS or (name in PUTS and place > MOST_INSTRUCTIONS):
            raise pickle.UnpicklingError(f"it has more than {MOST_INSTRUCTIONS:,} instructions or places in the memo")
        if name in GETS and not reusable.get(place):
            raise pickle.UnpicklingError("it uses something again that is no name, short text or array")
        if name in PUTS:
            reusable[place] = last_is_reusable
        last_is_reusable = name in REUSABLE and len(argument or "") <= LONG_TEXT


def load(program: bytes) -> Any:
    """What the program makes, with stand-ins for arrays. One that is no dict of arrays can raise nearly anything."""
    check_instructions(program)
    return Unpickler(io.BytesIO(program)).load()
