"""The model is one vector: every weight and bias in one contiguous array, every gradient in another.

One exchange, one optimizer step, one broadcast, one checkpoint and one hash serve the whole model. Layers see named
views into the vectors; the mappings that hold the views let no name be bound to other memory.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from distconv.kernels.interface import Array

Shape = tuple[int, ...]
PIECE = 1 << 16  # numbers that are drawn at a time: they are drawn in float64, twice as large as most vectors


@dataclass(frozen=True)
class Spec:
    """What a layer asks for: an array of this shape, first drawn from a normal distribution (deviation 0: all `mean`).

    trained: else no optimizer moves it, but what the layer adds to its gradient, summed over the ranks, is added to it
    after each step: running means, for instance. decay: whether weight decay, if any, makes it smaller. of_data: the
    first values are instead this attribute of the training data, an array of the shape, where the data has it.
    """

    shape: Shape
    deviation: float = 0.0
    mean: float = 0.0
    trained: bool = True
    decay: bool = True
    of_data: str = ""


Specs = Mapping[str, "Spec | Specs"]  # by name, nested as the layers are
Views = Mapping[str, Any]  # the same nesting, arrays at the leaves


class Named(Mapping[str, Any]):
    """Views by name. They can be changed in place, by += too, but none can be replaced by another array."""

    def __init__(self, views: Mapping[str, Any]) -> None:
        self._views = dict(views)

    def __getitem__(self, name: str) -> Any:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __setitem__(self, name: str, view: Any) -> None:
        """What `views[name] += more` ends with: the same view. Raises TypeError for any other array."""
        if self._views.get(name) is not view:
            raise TypeError(
                f"{name} is a view that cannot be replaced: change it in place, by += or by [{name!r}][...] ="
            )


def check_specs(specs: Any) -> None:
    """Raise ValueError where these are not Specs: whatever a user's own layer gave."""
    if not isinstance(specs, Mapping):
        raise ValueError(f"its parameters are a {type(specs).__name__}, but a dict of Spec by name was expected")
    for name, spec in specs.items():
        if not isinstance(name, str) or not name or not name.isprintable() or "." in name:
            raise ValueError(f"a parameter is named {name!r}, but a word without a dot was expected")
        if not isinstance(spec, Spec):
            check_specs(spec)
        elif not is_shape(spec.shape):
            raise ValueError(f"{name} has the shape {spec.shape!r}, but a tuple of whole numbers from 1 was expected")
        elif not is_within(spec.deviation, 0, sys.float_info.max):
            raise ValueError(f"{name} has the deviation {spec.deviation!r}, but a number from 0 was expected")
        elif not is_within(spec.mean, -sys.float_info.max, sys.float_info.max):
            raise ValueError(f"{name} has the mean {spec.mean!r}, but a number was expected")


def is_shape(shape: Any) -> bool:
    """Whether this is a tuple of whole numbers from 1, which may be none."""
    return isinstance(shape, tuple) and all(is_whole(n) and n > 0 for n in shape)


def is_whole(number: Any) -> bool:
    """Whether this is a whole number, Python's or NumPy's, and no truth value."""
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def is_within(number: Any, least: float, most: float) -> bool:
    """Whether this is a real number, Python's or NumPy's, in these bounds."""
    return isinstance(number, Real) and least <= float(number) <= most


class Parameters:
    """Values and gradients of a model: what is not trained first, then the rest, as its layers list them.

    So what is trained is one piece, and the gradients of a layer and of all behind it are, too.

    vector and gradient are contiguous, of one dtype and `size` elements; values and grads are nested read-only mappings
    of views into them: values["conv1"]["W"].
    """

    def __init__(self, specs: Specs, dtype: DTypeLike = np.float32) -> None:
        self.specs = dict(sorted(_flatten(specs), key=lambda named: named[1].trained))
        sizes = [math.prod(spec.shape) for spec in self.specs.values()]
        self.size = sum(sizes)
        self.starts = dict(zip(self.specs, itertools.accumulate([0, *sizes]), strict=False))  # where each array begins
        self.vector: Array = np.zeros(self.size, dtype)
        self.gradient: Array = np.zeros(self.size, dtype)
        self.values = self.nested(self.vector)
        self.grads = self.nested(self.gradient)

    def named(self, vector: Array) -> dict[str, Array]:
        """Views "conv1.W", ... of any vector laid out as this model's is (an optimizer's moments, say)."""
        return {
            name: vector[start : start + math.prod(self.specs[name].shape)].reshape(self.specs[name].shape)
            for name, start in self.starts.items()
        }

    def by_slot(self, vectors: Mapping[str, Array]) -> dict[str, Array]:
        """Views of several such vectors, each named by its slot: value/conv1.W, and m/conv1.W of an optimizer's m."""
        named = {slot: self.named(vector) for slot, vector in vectors.items()}
        return {f"{slot}/{name}": view for slot, views in named.items() for name, view in views.items()}

    def nested(self, vector: Array) -> Views:
        """The same views, nested as the layers are: ["conv1"]["W"]."""
        return _nest(self.named(vector))

    @property
    def trained_size(self) -> int:
        """How many numbers are trained: what people call a model's parameters."""
        return count(self.specs, lambda spec: spec.trained)

    def initialize(self, seed: int, data: Any = None) -> None:
        """Draw the first values; each array has a stream of its own, so adding a layer changes no other.

        data: see Spec.of_data.
        """
        for name, view in self.named(self.vector).items():
            stream = np.random.default_rng([seed, zlib.crc32(name.encode())])
            numbers = view.reshape(-1)
            for start in range(0, numbers.size, PIECE):
                piece = numbers[start : start + PIECE]
                piece[...] = self.specs[name].deviation * stream.standard_normal(piece.size)
                if self.specs[name].mean:
                    piece += self.specs[name].mean
            if self.specs[name].of_data:
                view[...] = getattr(data, self.specs[name].of_data, view)

    def runs(self, of: Callable[[Spec], bool], apart: bool = False) -> list[slice]:
        """The parts of the vectors whose arrays are of a kind, neighbours as one, or each array apart."""
        found: list[slice] = []
        for name, start in self.starts.items():
            stop = start + math.prod(self.specs[name].shape)
            if of(self.specs[name]):
                joins = found and found[-1].stop == start and not apart
                found[-1:] = [slice(found[-1].start, stop)] if joins else [*found[-1:], slice(start, stop)]
        return found

    def start(self, layer: str) -> int | None:
        """Index of the first trained number of a layer of the model, or None where it has none."""
        starts = (
            start for name, start in self.starts.items() if self.specs[name].trained and name.startswith(f"{layer}.")
        )
        return next(starts, None)

    def name_at(self, index: int) -> str:
        """The name of the array that holds the number at this index of the vectors."""
        return max((start, name) for name, start in self.starts.items() if start <= index)[1]

    def digest(self) -> str:
        """SHA-256 over the bits of the values."""
        return hashlib.sha256(self.vector.data).hexdigest()

    def layout(self) -> str:
        """Names, shapes and dtype as text: what ranks and checkpoints must share."""
        return "; ".join(f"{name} {spec.shape}" for name, spec in self.specs.items()) + f"; {self.vector.dtype}"


def digest(tensors: Mapping[str, Array], text: str = "") -> str:
    """SHA-256 over a text and the names, shapes, dtypes and bits of tensors, in the order of their names."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        sha.update(f"{name} {tensors[name].shape} {tensors[name].dtype}".encode())
        sha.update(np.ascontiguousarray(tensors[name]).data)
    return sha.hexdigest()


def untrained(specs: Specs) -> Specs:
    """The same arrays as untrained state: for a copy that follows the trained one, say."""
    return {
        name: replace(spec, trained=False) if isinstance(spec, Spec) else untrained(spec)
        for name, spec in specs.items()
    }


def count(specs: Specs, of: Callable[[Spec], bool] = lambda spec: True) -> int:
    """How many numbers the parameters of a kind are."""
    return sum(math.prod(spec.shape) for _, spec in _flatten(specs) if of(spec))


def _flatten(specs: Specs, prefix: str = "") -> list[tuple[str, Spec]]:
    flat: list[tuple[str, Spec]] = []
    for name, spec in specs.items():
        flat += [(prefix + name, spec)] if isinstance(spec, Spec) else _flatten(spec, f"{prefix}{name}.")
    return flat


def _nest(named: Mapping[str, Array]) -> Views:
    tree: dict[str, Any] = {}
    for path, view in named.items():
        *folders, name = path.split(".")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[name] = view
    return _freeze(tree)


def _freeze(tree: dict[str, Any]) -> Views:
    return Named({name: _freeze(node) if isinstance(node, dict) else node for name, node in tree.items()})
