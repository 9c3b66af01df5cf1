"""Pickled dicts of arrays, read by Python's own unpickler, while nothing runs that the file names.

A pickle is a program. Its instructions are looked at first: only some kinds are admitted, long bytes are not used
twice, and tuples neither, as some hundred bytes of tuples within tuples take hours to hash. Then the unpickler runs
them, and each name that they ask for is a class of this file. So time and memory grow with the file and no faster: a
dict of arrays takes two to five times its size, the worst file eight times and some MiB.

Arrays hold floats or unsigned bytes. What Python 2 wrote as str comes as bytes, as nobody knows its encoding.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_INSTRUCTIONS = 10_000  # an array takes about 50
MOST_TUPLES = 10_000  # but for those that calls have taken; as many within one another can still be hashed
LONG_TEXT = 100  # characters or bytes; a longer one is an array's numbers, as older protocols write them
TEXTS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8", "SHORT_BINSTRING", "BINSTRING"}
SCALARS = {"NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "BINFLOAT"}
TUPLES = {"TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
COLLECTIONS = {"MARK", "LIST", "EMPTY_LIST", "APPEND", "APPENDS", "DICT", "EMPTY_DICT", "SETITEM", "SETITEMS"}
PUTS, GETS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}  # of the unpickler's memo
REUSABLE = TEXTS | BYTES | {"GLOBAL", "STACK_GLOBAL", "REDUCE"}  # what makes a thing that may be used again
ADMITTED = REUSABLE | SCALARS | TUPLES | COLLECTIONS | PUTS | GETS | {"PROTO", "FRAME", "BUILD", "STOP"}


def as_text(value: Any) -> Any:
    """Python 2's str as Python 3's; anything else as it is."""
    return value.decode("latin-1") if isinstance(value, bytes) else value


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
    """Of floats or unsigned bytes; without a dtype for others."""

    def __init__(self, kind: Any, align: Any, copy: Any) -> None:
        kind = as_text(kind)
        self.dtype = np.dtype(kind) if isinstance(kind, str) and kind in ("f2", "f4", "f8", "u1") else None

    def __setstate__(self, state: Any) -> None:
        order = as_text(state[1])
        if self.dtype is not None and order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class PickledArray(StandIn):
    """Without an array until its numbers have come. Protocols 0 to 4 give them as a state, protocol 5 at once."""

    def __init__(self, *arguments: Any) -> None:
        self.array: NDArray[Any] | None = None
        if len(arguments) > 3:
            self.fill(*arguments)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, numbers = state
        self.fill(numbers, dtype, shape, "F" if is_fortran else "C")

    def fill(self, numbers: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> None:
        """View the bytes as an array; raises ValueError or TypeError where they do not fit the shape."""
        if isinstance(dtype, PickledDtype) and dtype.dtype is not None:
            array = np.frombuffer(numbers, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
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


def check_instructions(program: bytes, most: int) -> None:
    """Raises UnpicklingError for what no dict of arrays needs, ValueError for a broken or cut off program."""
    reusable: dict[Any, bool] = {}  # by place in the memo
    last_is_reusable = False
    tuples = 0
    for count, (instruction, argument, _) in enumerate(pickletools.genops(program)):
        name = instruction.name
        place: Any = len(reusable) if name == "MEMOIZE" else argument
        if name not in ADMITTED:
            raise pickle.UnpicklingError(f"it has the instruction {name}, which no dict of arrays needs")
        tuples += (name in TUPLES) - (name == "REDUCE")
        if tuples > MOST_TUPLES:
            raise pickle.UnpicklingError(f"it has more than {MOST_TUPLES:,} tuples at a time")
        if count >= most or (name in PUTS and place > most):
            raise pickle.UnpicklingError(f"it has more than {most:,} instructions or places in the memo")
        if name in GETS and not reusable.get(place):
            raise pickle.UnpicklingError("it uses something again that is no name, short text or array")
        if name in PUTS:
            reusable[place] = last_is_reusable
        last_is_reusable = name in REUSABLE and len(argument or "") <= LONG_TEXT


def load(program: bytes, most: int = MOST_INSTRUCTIONS) -> Any:
    """What the program makes, of at most so many instructions, with stand-ins for arrays.

    One that is no dict of arrays can raise nearly anything.
    """
    check_instructions(program, most)
    return Unpickler(io.BytesIO(program), encoding="bytes").load()
