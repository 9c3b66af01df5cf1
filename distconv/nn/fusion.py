"""Layers that follow each other as one: what lies between them is not written to memory, or not in full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distconv.kernels.interface import Array
from distconv.nn.blocks import Branches, Residual
from distconv.nn.layers import Backward, Chain, Context, Conv, Layer, MaxPool, inner_layers
from distconv.nn.normalization import ConvNorm
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


@dataclass(frozen=True)
class ResidualNorm:
    """A Residual whose body is a Chain of two ConvNorm or more, the last of which has no ReLU of its own.

    The last one adds what lies beside, and the first one adds the gradient of that to its dx.
    """

    block: Residual
    norms: tuple[tuple[str, Any], ...]  # the ConvNorms of its body, or what stands for them

    @property
    def layers(self) -> Sequence[tuple[str, Layer]]:
        return self.block.layers

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        return self.block.shapes(input_shape)

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        if not context.training:
            return self.block.forward(x, params, context)
        shortcut, beside, shortcut_backward = self.block.shortcut, x, None
        y, backwards = x, []
        *first, (last_name, last) = self.norms
        for name, layer in first:
            y, layer_backward = layer.train(y, params["body"][name], context)
            backwards.append((name, layer_backward))
        if shortcut is not None:  # in evaluation's order
            beside, shortcut_backward = shortcut.forward(x, params.get("shortcut", {}), context.within("shortcut"))
        y, last_backward = last.train(y, params["body"][last_name], context, beside, self.block.relu)

        def backward(dy: Array, grads: Views, wants_dx: bool) -> Array | None:
            of_body = grads["body"]
            dx: Array | None
            dx, dbeside = last_backward(dy, of_body[last_name], True, None)
            for i, (name, layer_backward) in reversed(list(enumerate(backwards))):
                onto = dbeside if i == 0 and shortcut is None else None
                dx, _ = layer_backward(dx, of_body[name], wants_dx or i > 0, onto)
            if shortcut_backward is None:
                return dx
            other = shortcut_backward(dbeside, grads.get("shortcut", {}), wants_dx)
            return context.kernels.plus(dx, other, False) if wants_dx else None

        return y, backward


def fused(model: Layer) -> Layer:
    """The same model and parameters, with one layer for a Conv and the MaxPool(2, 2) behind it, and ResidualNorm."""
    if type(model) is not Chain:  # a user's own kind may compute something else, here and below
        return model
    layers: list[tuple[str, Layer]] = []
    for name, layer in model.layers:
        before = layers[-1][1] if layers else None
        if layer == MaxPool() and type(before) is Conv:
            layers[-1] = layers[-1][0], ConvPool(before)
        elif type(layer) is Residual and (norms := _norms(layer.body)):
            layers.append((name, ResidualNorm(layer, norms)))
        else:
            layers.append((name, layer))
    return Chain.named(layers)


def with_inner(layer: Layer, change: Callable[[str, Layer], Layer]) -> Layer:
    """The same Chain or block, but with change(name, inner) for each layer within; any other layer as it is.

    A user's own kind of these is another layer: it may compute something else. Of a ResidualNorm, only its shortcut.
    """
    if type(layer) is Chain:
        return Chain.named((name, change(name, inner)) for name, inner in layer.layers)
    if type(layer) is Branches:
        return Branches(*(change(name, inner) for name, inner in layer.layers))
    if type(layer) is Residual:
        shortcut = None if layer.shortcut is None else change("shortcut", layer.shortcut)
        return Residual(change("body", layer.body), shortcut, layer.relu)
    if type(layer) is ResidualNorm and layer.block.shortcut is not None:
        return replace(layer, block=replace(layer.block, shortcut=change("shortcut", layer.block.shortcut)))
    return layer


def _norms(body: Layer) -> tuple[tuple[str, ConvNorm], ...]:
    """The layers of a body that a ResidualNorm may have, by name; none of any other."""
    layers = inner_layers(body) if type(body) is Chain else []
    norms = tuple((name, layer) for name, layer in layers if type(layer) is ConvNorm)
    return norms if len(layers) == len(norms) > 1 and not norms[-1][1].relu else ()
