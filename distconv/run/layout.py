"""How files of arrays name and lay out a model's parameters: as the source does where it can, else as this project.

The source keeps images as (C, H, W), so the k-th layer with weights has Wk (F, C, K, K), or (inputs, outputs) with rows
in (C, H, W) order, and bk. That tells all of a Chain that trains Conv and Affine layers alone. Of any other network
(batch norm, branches), and of what is not trained, the names and layouts are those of Parameters.named: convnorm1.W
(K, K, C, F).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distconv.errors import BadDataError, MismatchError
from distconv.kernels.interface import Array
from distconv.nn.layers import Affine, Chain, Conv, Layer
from distconv.nn.parameters import Parameters, Shape, Spec

FileArrays = Mapping[str, "Array | None"]  # by their names in a file; None: what is no array of floats


@dataclass(frozen=True)
class Place:
    """Where a file keeps one array of a model. key: its name there; name: here; needed: else a file may lack it.

    Both hold the same numbers: the file's array, seen as an array of shape `split`, has our axes in this order.
    """

    key: str
    name: str
    shape: Shape  # in the file
    split: Shape
    axes: tuple[int, ...]
    needed: bool

    def to_ours(self, array: Array) -> Array:
        """An array of the file -> with its axes in our order."""
        return array.reshape(self.split).transpose(self.axes)

    def to_file(self, ours: Array) -> Array:
        """The way back."""
        turned = ours.reshape([self.split[axis] for axis in self.axes]).transpose(np.argsort(self.axes))
        return np.ascontiguousarray(turned).reshape(self.shape)


def places(model: Layer, parameters: Parameters, input_shape: Shape) -> Sequence[Place]:
    """One for each array of the model, which takes inputs of this shape; in the order of Parameters.named."""
    specs = parameters.specs
    numbered = _numbered(model, specs, input_shape)
    if any(spec.trained and name not in numbered for name, spec in specs.items()):
        numbered = {}
    return [
        numbered.get(name) or Place(name, name, spec.shape, spec.shape, tuple(range(len(spec.shape))), spec.trained)
        for name, spec in specs.items()
    ]


def _numbered(model: Layer, specs: Mapping[str, Spec], input_shape: Shape) -> dict[str, Place]:
    """The source's places, of the convolutions and affine layers of a Chain, by our names."""
    found: dict[str, Place] = {}
    shape = input_shape
    for name, layer in model.layers if type(model) is Chain else ():  # a user's own kind may have other parameters
        if type(layer) in (Conv, Affine):
            k = len(found) // 2 + 1
            W, b = (specs[f"{name}.{which}"].shape for which in "Wb")
            split, axes = W, tuple(range(len(W)))
            if isinstance(layer, Conv):
                W = split = (W[3], W[2], *W[:2])
                axes = (2, 3, 1, 0)
            elif len(shape) == 3:
                split, axes = (shape[2], *shape[:2], W[1]), (1, 2, 0, 3)
            found[f"{name}.W"] = Place(f"W{k}", f"{name}.W", W, split, axes, True)
            found[f"{name}.b"] = Place(f"b{k}", f"{name}.b", b, b, (0,), True)
        shape, _ = layer.shapes(shape)
    return found


def check(arrays: FileArrays, wanted: Sequence[Place], path: Path) -> list[str]:
    """Look whether a file's arrays can be a model's; returns the names of what the model has no place for.

    Raises MismatchError where an array is missing or has another shape, BadDataError where one is no array of finite
    floats. Only what the model needs is looked at.
    """
    for place in wanted:
        if place.key not in arrays and not place.needed:
            continue
        array = arrays.get(place.key)
        if place.key in arrays and array is None:
            raise BadDataError(f"{path}: {place.key!r} is no array of floats, but one of {place.shape} was expected")
        if array is None:
            holds = listed(list(arrays)) if arrays else "nothing"
            raise MismatchError(
                f"{path}: {place.key} is missing, which this model needs as {place.shape}; the file holds {holds}: "
                "name its model by --model, or name and lay out the arrays as distconv.export --help says"
            )
        if array.shape != place.shape:
            raise MismatchError(
                f"{path}: {place.key} is {array.shape}, this model needs {place.shape}: name its model by --model, "
                "take images of the size that it had, or lay the array out as distconv.export --help says"
            )
        if not np.isfinite(array).all():
            raise BadDataError(f"{path}: {place.key!r} holds NaN or infinity, but finite numbers were expected")
    keys = {place.key for place in wanted}
    return [name for name in arrays if name not in keys]


def fill(parameters: Parameters, arrays: FileArrays, wanted: Sequence[Place], path: Path) -> None:
    """Fill a model with arrays that `check` lets pass; what they lack keeps its values.

    Raises MismatchError for numbers that the parameters' dtype cannot hold.
    """
    views = parameters.named(parameters.vector)
    for place in wanted:
        array = arrays.get(place.key)
        if array is not None:
            view = views[place.name]
            with np.errstate(over="ignore"):
                view[...] = place.to_ours(array).reshape(view.shape)
            if not np.isfinite(view).all():
                raise MismatchError(
                    f"{path} holds numbers in {place.key} that are too large for {view.dtype}: give --wire float64, "
                    "which computes in float64, or other weights"
                )


def to_file(parameters: Parameters, wanted: Sequence[Place]) -> dict[str, Array]:
    """A model's arrays as a file names and lays them out, copies in the parameters' dtype."""
    views = parameters.named(parameters.vector)
    return {place.key: place.to_file(views[place.name]) for place in wanted}


def listed(names: Sequence[str]) -> str:
    """Names from a file, for people: a few of them, and none of them long."""
    return ", ".join(repr(name[:40]) for name in names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)
