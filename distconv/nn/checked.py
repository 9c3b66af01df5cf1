"""A model that is looked over while it computes: a user's own layers must give what they say they give.

So must a user's data, and a task a gradient of what the model gave. Else a mistake would show somewhere else: in
compiled code, for instance, which trusts the shapes of its arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from distconv.errors import UsageError
from distconv.kernels.interface import Array
from distconv.nn.fusion import with_inner
from distconv.nn.layers import Backward, Chain, Context, Layer, is_ours, kind_of
from distconv.nn.parameters import Shape, Spec, Specs, Views

FLOATS = np.float32, np.float64  # in this machine's order of bytes
ADVICE = "have batches be floats of the data's image_shape"


@dataclass(frozen=True)
class Checked:
    """A layer whose passes, and what they are given, must keep to its shapes. Raises UsageError where they do not."""

    layer: Layer

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        return self.layer.shapes(input_shape)

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        kind = type(self.layer).__name__
        # A layer of the user's own may take whole numbers.
        if not isinstance(x, np.ndarray) or (is_ours(self.layer) and x.dtype not in FLOATS):
            raise UsageError(f"{kind} was given {_shown(x)}, but floats of 32 or 64 bits were expected: {ADVICE}")
        try:
            declared, specs = self.shapes(x.shape[1:])
        except ValueError as error:
            raise UsageError(f"{error}: {ADVICE}") from None
        if not _fit(specs, params):
            raise UsageError(f"{kind} was given {_shown(x)}, for which its parameters are not made: {ADVICE}")
        before = x.copy()
        found: Any = self.layer.forward(x, params, context)
        if not np.array_equal(x, before, equal_nan=True):
            raise UsageError(f"{kind}.forward changed its input, which other layers still need: change a copy of it")
        if not isinstance(found, tuple) or len(found) != 2 or not callable(found[1]):
            raise UsageError(f"{kind}.forward gave {_shown(found)}, but (y, backward) was expected")
        y, layer_backward = found
        _check(f"{kind}.forward", y, (len(x), *declared))

        def backward(dy: Array, grads: Views, wants_dx: bool) -> Array | None:
            if not _are_floats(dy, y.shape):  # a layer's are looked at where they are made
                raise UsageError(
                    f"the backward pass of {kind} was given {_shown(dy)}, but floats of shape {y.shape}, as its "
                    "forward pass gave, were expected, of 32 or 64 bits: the task must hand back such a gradient"
                )
            dx: Array | None = layer_backward(dy, grads, wants_dx)
            if wants_dx:
                _check(f"the backward pass of {kind}", dx, x.shape)
            return dx

        return y, backward


def checked(model: Layer) -> Layer:
    """The same model and parameters, each of its layers Checked, those within chains and blocks, too."""
    within = with_inner(model, lambda name, layer: checked(layer))
    return within if type(within) is Chain else Checked(within)


def _fit(specs: Specs, params: Views) -> bool:
    """Whether these parameters, of which a task may give a part only, have the shapes that a layer asks for."""
    return all(
        np.shape(params[name]) == spec.shape if isinstance(spec, Spec) else _fit(spec, params[name])
        for name, spec in specs.items()
        if name in params
    )


def _check(who: str, found: Any, shape: Shape) -> None:
    if not _are_floats(found, shape):
        raise UsageError(f"{who} gave {_shown(found)}, but floats of shape {shape} were expected, of 32 or 64 bits")


def _are_floats(found: Any, shape: Shape) -> bool:
    return isinstance(found, np.ndarray) and found.shape == shape and found.dtype in FLOATS


def _shown(found: Any) -> str:
    if isinstance(found, np.ndarray):
        return f"{found.dtype} of shape {found.shape}"
    return f"{len(found)} values" if isinstance(found, tuple) else kind_of(found)
