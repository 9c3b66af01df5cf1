"""Parameters saved by the source system: a pickle of a dict of arrays 'W1', 'b1', 'W2', ... Read, never written.

A pickle is a program. This unpickler admits NumPy arrays and plain containers, refuses every other name, and puts
stand-ins of its own in NumPy's place, so no code of the file's choosing runs. The source keeps images as (C, H, W) and
filters as (F, C, K, K); what is read is turned into this project's (H, W, C) and (K, K, C, F), the rows of the first
affine layer included.
"""

from __future__ import annotations

import io
import operator
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from distconv.errors import BadDataError, MismatchError, MissingInputError, StorageError
from distconv.kernels.cpu import Array
from distconv.nn.layers import Affine, Chain, Conv, Layer
from distconv.nn.parameters import Parameters, Shape

LARGEST = 1 << 30  # bytes of a file
MOST_OPCODES = 10_000  # an array takes about 30
ADMITTED_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")


class _Dtype:
    """Stands for numpy.dtype in a pickle: plain numbers only."""

    def __init__(self, name: str, align: bool = False, copy: bool = True) -> None:
        if name not in ADMITTED_NUMBERS:
            raise pickle.UnpicklingError(f"numbers of type {str(name)[:20]!r} are not admitted")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray in a pickle: NumPy sees its numbers only when they were checked."""

    array: Array | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, numbers = state
        self.array = _array(numbers, kind, shape, "F" if is_fortran else "C")


def _array(numbers: Any, kind: Any, shape: Any, order: Any) -> Array:
    if not isinstance(numbers, (bytes, bytearray)) or not isinstance(kind, _Dtype):
        raise pickle.UnpicklingError("an array is not made of the bytes of numbers")
    return np.frombuffer(bytes(numbers), kind.dtype).reshape(tuple(map(operator.index, shape)), order=order)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    """An array that is still empty, as protocols 0 to 4 begin one."""
    return _Array()


def _frombuffer(numbers: Any, kind: Any, shape: Any, order: str) -> _Array:
    """A whole array, as protocol 5 has it."""
    result = _Array()
    result.array = _array(numbers, kind, shape, order)
    return result


def _encode(text: str, encoding: str) -> bytes:
    """How older pickles write bytes: as latin-1 text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding} are not admitted")
    return text.encode("latin-1")


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not admitted") from None


def _check_program(program: bytes) -> None:
    """Raise where a pickle has what no dict of arrays needs and what could take the interpreter's memory or stack."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        if count >= MOST_OPCODES:
            raise pickle.UnpicklingError(f"it has more than {MOST_OPCODES:,} instructions")
        if "PUT" in opcode.name and argument is not None and argument > count:
            raise pickle.UnpicklingError(f"it remembers something in place {argument}")
        if isinstance(argument, int) and abs(argument) >= 1 << 63:
            raise pickle.UnpicklingError("it holds a number of more than 64 bits")


def read_pickle(path: Path) -> dict[str, Array]:
    """The arrays of a file by name. Raises MissingInputError, StorageError, BadDataError for anything else."""
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # in a folder that may not be entered, or no name that a file can have
        is_file = False
    if not is_file:
        raise MissingInputError(f"{path} is not a file: a pickle of parameters or a checkpoint was expected")
    try:
        if path.stat().st_size > LARGEST:
            raise BadDataError(f"{path} has {path.stat().st_size:,} bytes; at most {LARGEST:,} are read")
        program = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from None
    try:
        _check_program(program)
        content = _ArrayUnpickler(io.BytesIO(program)).load()
    except Exception as error:  # a broken pickle can raise nearly anything
        raise BadDataError(f"{path} is not a pickle of arrays: {str(error)[:200]}; nothing of it was run") from None
    if not isinstance(content, dict):
        kind = "ndarray" if isinstance(content, _Array) else type(content).__name__
        raise BadDataError(f"{path} holds a {kind}, but a dict of arrays 'W1', 'b1', ... was expected")
    arrays: dict[str, Array] = {}
    for name, value in content.items():
        if not isinstance(name, str):
            raise BadDataError(f"{path} has a {type(name).__name__} for a name, but 'W1', 'b1', ... were expected")
        array = value.array if isinstance(value, _Array) else None
        if array is None or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise BadDataError(f"{path}: {name[:40]!r} is no array of finite numbers; a dict of such was expected")
        arrays[name] = array
    return arrays


def from_source(arrays: dict[str, Array], model: Layer, input_shape: Shape, parameters: Parameters, path: Path) -> None:
    """Fill parameters with the arrays of the source, whose k-th layer with weights is Wk and bk.

    Raises MismatchError where names or shapes are not those of this model.
    """
    if not isinstance(model, Chain):
        raise MismatchError(f"{path}: only a Chain of layers, such as deepconvnet, can be filled from a pickle")
    number = 0
    shape = input_shape
    turned: dict[str, Array] = {}
    for name, layer in model.layers:
        if isinstance(layer, (Conv, Affine)):
            number += 1
            W, b = parameters.values[name]["W"], parameters.values[name]["b"]
            given_shape = (W.shape[3], W.shape[2], *W.shape[:2]) if isinstance(layer, Conv) else W.shape
            for key, wanted in ((f"W{number}", given_shape), (f"b{number}", b.shape)):
                have = arrays[key].shape if key in arrays else "missing"
                if have != wanted:
                    raise MismatchError(
                        f"{path}: {key} is {have}, this model needs {wanted}; name its model by --model"
                    )
            turned[f"{name}.W"] = _turn(arrays[f"W{number}"], layer, shape)
            turned[f"{name}.b"] = arrays[f"b{number}"]
        shape, _ = layer.shapes(shape)
    if len(arrays) != 2 * number:
        extra = sorted(set(arrays) - {f"{kind}{i + 1}" for kind in "Wb" for i in range(number)})
        raise MismatchError(
            f"{path}: {', '.join(extra[:4])} belong to no layer of this model; name its model by --model"
        )
    for name, view in parameters.named(parameters.vector).items():
        view[...] = turned[name]


def _turn(W: Array, layer: Layer, input_shape: Shape) -> Array:
    """(F, C, K, K) -> (K, K, C, F); for an affine layer after an image, rows in (C, H, W) order -> (H, W, C) order."""
    if isinstance(layer, Conv):
        return W.transpose(2, 3, 1, 0)
    if len(input_shape) == 3:
        H, Wd, C = input_shape
        return W.reshape(C, H, Wd, -1).transpose(1, 2, 0, 3).reshape(W.shape)
    return W
