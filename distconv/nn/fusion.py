"""A convolution and the pooling behind it as one layer: what lies between is never written to memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distconv.kernels.interface import Array
from distconv.nn.layers import Backward, Chain, Context, Conv, Layer, MaxPool
from distconv.nn.parameters import Shape, Specs, Views


@dataclass(frozen=True)
class ConvPool:
    """A Conv, then MaxPool(2, 2)."""

    conv: Conv

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        shape, specs = self.conv.shapes(input_shape)
        return MaxPool().shapes(shape)[0], specs

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        kernels, conv = context.kernels, self.conv
        y, winner = kernels.conv_pool_forward(x, params["W"], params["b"], conv.stride, conv.margin, conv.relu)

        def backward(dy: Array, grads: Views, wants_dx: bool) -> Any:
            w, dw, db = params["W"], grads["W"], grads["b"]
            return kernels.conv_pool_backward(x, winner, dy, w, conv.stride, conv.margin, conv.relu, dw, db, wants_dx)

        return y, backward


def fused(model: Layer) -> Layer:
    """The same model and parameters, where a Conv and a MaxPool(2, 2) that follow each other are one layer."""
    if type(model) is not Chain:  # a user's own kind may compute something else
        return model
    layers: list[tuple[str, Layer]] = []
    for name, layer in model.layers:
        before = layers[-1][1] if layers else None
        if layer == MaxPool() and type(before) is Conv:  # a user's own kind may compute something else
            layers[-1] = layers[-1][0], ConvPool(before)
        else:
            layers.append((name, layer))
    return Chain.named(layers)
