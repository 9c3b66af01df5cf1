"""A model that is looked over while it computes: a user's own layers must give what they say they give.

Else a mistake would show somewhere else: in compiled code, for instance, which trusts the shapes of its arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from distconv.errors import UsageError
from distconv.kernels.interface import Array
from distconv.nn.fusion import with_inner
from distconv.nn.layers import Backward, Chain, Context, Layer, kind_of
from distconv.nn.parameters import Shape, Specs, Views


@dataclass(frozen=True)
class Checked:
    """A layer whose passes must keep to its shapes. Raises UsageError where they do not."""

    layer: Layer

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        return self.layer.shapes(input_shape)

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        kind, (declared, _) = type(self.layer).__name__, self.shapes(x.shape[1:])
        before = x.copy()
        found: Any = self.layer.forward(x, params, context)
        if not np.array_equal(x, before, equal_nan=True):
            raise UsageError(f"{kind}.forward changed its input, which other layers still need: change a copy of it")
        if not isinstance(found, tuple) or len(found) != 2 or not callable(found[1]):
            raise UsageError(f"{kind}.forward gave {_shown(found)}, but (y, backward) was expected")
        y, layer_backward = found
        _check(f"{kind}.forward", y, (len(x), *declared))

        def backward(dy: Array, grads: Views, wants_dx: bool) -> Array | None:
            dx: Array | None = layer_backward(dy, grads, wants_dx)
            if wants_dx:
                _check(f"the backward pass of {kind}", dx, x.shape)
            return dx

        return y, backward


def checked(model: Layer) -> Layer:
    """The same model and parameters, each of its layers Checked, those within chains and blocks, too."""
    within = with_inner(model, lambda name, layer: checked(layer))
    return within if type(within) is Chain else Checked(within)


def _check(who: str, found: Any, shape: Shape) -> None:
    if not isinstance(found, np.ndarray) or found.shape != shape or found.dtype not in (np.float32, np.float64):
        raise UsageError(f"{who} gave {_shown(found)}, but floats of shape {shape} were expected, of 32 or 64 bits")


def _shown(found: Any) -> str:
    if isinstance(found, np.ndarray):
        return f"{found.dtype} of shape {found.shape}"
    return f"{len(found)} values" if isinstance(found, tuple) else kind_of(found)
