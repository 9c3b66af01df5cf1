"""Parameters saved by the source system: a pickle of a dict of arrays 'W1', 'b1', 'W2', ... Read, never written.

A pickle is a program. This unpickler admits NumPy arrays and plain containers and refuses every other name, so no code
of the file's choosing runs. The source keeps images as (C, H, W) and filters as (F, C, K, K); what is read is turned
into this project's (H, W, C) and (K, K, C, F), the rows of the first affine layer included.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from distconv.errors import BadDataError, MismatchError, MissingInputError, StorageError
from distconv.kernels.cpu import Array
from distconv.nn.layers import Affine, Chain, Conv, Layer
from distconv.nn.parameters import Parameters, Shape

LARGEST = 1 << 30  # bytes of a file


def _encode(text: str, encoding: str) -> bytes:
    """How older pickles write bytes: as latin-1 text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding} are not admitted")
    return text.encode("latin-1")


def _admitted() -> dict[tuple[str, str], Any]:
    """What a pickle of NumPy 1 or 2 arrays may name."""
    from numpy._core import multiarray, numeric

    names: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _encode,
    }
    for core in ("numpy.core", "numpy._core"):
        names[(f"{core}.multiarray", "_reconstruct")] = multiarray._reconstruct
        names[(f"{core}.multiarray", "scalar")] = multiarray.scalar
        names[(f"{core}.numeric", "_frombuffer")] = numeric._frombuffer  # type: ignore[attr-defined]
    return names


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _admitted()[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not admitted") from None


def read_pickle(path: Path) -> dict[str, Array]:
    """The arrays of a file by name. Raises MissingInputError, StorageError, BadDataError for anything else."""
    if not path.is_file():
        raise MissingInputError(f"{path} is not a file: a pickle of parameters or a checkpoint was expected")
    try:
        if path.stat().st_size > LARGEST:
            raise BadDataError(f"{path} has {path.stat().st_size:,} bytes; at most {LARGEST:,} are read")
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from None
    except BadDataError:
        raise
    except Exception as error:  # a broken pickle can raise nearly anything
        raise BadDataError(f"{path} is not a pickle of arrays: {error}; nothing of it was run") from None
    if not isinstance(content, dict):
        raise BadDataError(
            f"{path} holds a {type(content).__name__}, but a dict of arrays 'W1', 'b1', ... was expected"
        )
    for name, value in content.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu" or not np.isfinite(value).all():
            raise BadDataError(f"{path}: {name!r} is no array of finite numbers; a dict of such was expected")
    return {str(name): value for name, value in content.items()}


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
