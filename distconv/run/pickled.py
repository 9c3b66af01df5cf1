"""Parameters saved by the source system: a pickle of a dict of arrays 'W1', 'b1', 'W2', ... Read, never written.

The source keeps images as (C, H, W) and filters as (F, C, K, K); what is read is turned into this project's (H, W, C)
and (K, K, C, F), the rows of the first affine layer included.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distconv.data.unpickler import PickledArray, load
from distconv.errors import BadDataError, MismatchError, MissingInputError, StorageError
from distconv.kernels.interface import Array
from distconv.nn.layers import Affine, Chain, Conv, Layer
from distconv.nn.parameters import Parameters, Shape

LARGEST = 1 << 30  # bytes of a file


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
        content = load(program)
    except Exception as error:  # a broken pickle can raise nearly anything
        raise BadDataError(f"{path} is not a pickle of arrays: {str(error)[:200]}; nothing of it was run") from None
    if not isinstance(content, dict):
        kind = "ndarray" if isinstance(content, PickledArray) else type(content).__name__
        raise BadDataError(f"{path} holds a {kind}, but a dict of arrays 'W1', 'b1', ... was expected")
    arrays: dict[str, Array] = {}
    looked_at = 0  # bytes; nobody shall wait while many arrays of the same bytes are looked at
    for name, value in content.items():
        if not isinstance(name, str):
            raise BadDataError(f"{path} has a {type(name).__name__} for a name, but 'W1', 'b1', ... were expected")
        array = value.array if isinstance(value, PickledArray) else None
        looked_at += 0 if array is None else array.nbytes
        too_many = looked_at > 10 * len(program)
        if array is None or array.dtype.kind != "f" or too_many or not np.isfinite(array).all():
            raise BadDataError(f"{path}: {name[:40]!r} is no array of finite floats; a dict of such was expected")
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
        extra = sorted(name[:40] for name in set(arrays) - {f"{kind}{i + 1}" for kind in "Wb" for i in range(number)})
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
