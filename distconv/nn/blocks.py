"""Blocks: layers that are made of layers, of which there is more than one way from input to output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distconv.errors import UsageError
from distconv.kernels.interface import Array
from distconv.nn.layers import Backward, Context, Layer, check_switch, is_layer, is_ours, kind_of, shapes_of
from distconv.nn.parameters import Shape, Specs, Views


@dataclass(frozen=True)
class Residual:
    """body(x) + x and, unless told otherwise, ReLU (He et al. 2015, arXiv 1512.03385).

    shortcut: a layer in place of x itself, where the body changes the shape: a projection.
    """

    body: Layer
    shortcut: Layer | None = None
    relu: bool = True

    def __post_init__(self) -> None:
        _check_layers("Residual", [layer for _, layer in self.layers])

    @property
    def layers(self) -> Sequence[tuple[str, Layer]]:
        return [("body", self.body)] + ([] if self.shortcut is None else [("shortcut", self.shortcut)])

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        check_switch(self, "relu", self.relu)
        found = {name: shapes_of(layer, input_shape) for name, layer in self.layers}
        shape, beside = found["body"][0], found["shortcut"][0] if "shortcut" in found else input_shape
        if shape != beside:
            raise ValueError(
                f"Residual: its body makes {shape} of {input_shape}, which cannot be added to {beside}: give it a "
                "shortcut that makes the same, as ConvNorm(filters, size=1, stride=2, relu=False)"
            )
        return shape, {name: specs for name, (_, specs) in found.items()}

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        kernels, beside, shortcut_backward = context.kernels, x, None
        y, body_backward = self.body.forward(x, params.get("body", {}), context.within("body"))
        if self.shortcut is not None:
            within = context.within("shortcut")
            beside, shortcut_backward = self.shortcut.forward(x, params.get("shortcut", {}), within)
        y = kernels.plus(y, beside, self.relu)

        def backward(dy: Array, grads: Views, wants_dx: bool) -> Array | None:
            dsum: Array = kernels.relu_backward(dy, y) if self.relu else dy
            # Many a user's backward pass writes to its dy, which is to be added beside, too.
            dbody = dsum if is_ours(self.body) else dsum.copy()
            dx = body_backward(dbody, grads.get("body", {}), wants_dx)
            dbeside: Array | None = dsum
            if shortcut_backward:
                dbeside = shortcut_backward(dsum, grads.get("shortcut", {}), wants_dx)
            return kernels.plus(dx, dbeside, False) if wants_dx else None

        return y, backward


@dataclass(frozen=True, init=False)
class Branches:
    """The channels of several layers of one input side by side (Szegedy et al. 2015, arXiv 1409.4842).

    Each gives images of the same height and width. They are named branch1, branch2 and so on.
    """

    layers: tuple[tuple[str, Layer], ...]

    def __init__(self, *branches: Layer) -> None:
        _check_layers("Branches", branches)
        if not branches:
            raise UsageError("Branches() has no layers: give it one for each branch")
        named = tuple((f"branch{i}", branch) for i, branch in enumerate(branches, start=1))
        object.__setattr__(self, "layers", named)

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        found = {name: shapes_of(branch, input_shape) for name, branch in self.layers}
        shapes = [shape for shape, _ in found.values()]
        if any(len(shape) != 3 for shape in shapes) or len({shape[:2] for shape in shapes}) > 1:
            raise ValueError(
                f"Branches: they make {', '.join(map(str, shapes))} of {input_shape}, but images of one height and "
                'width were expected: pad them by "same", say'
            )
        channels = sum(shape[2] for shape in shapes)
        return (*shapes[0][:2], channels), {name: specs for name, (_, specs) in found.items()}

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        kernels = context.kernels
        passes = [branch.forward(x, params.get(name, {}), context.within(name)) for name, branch in self.layers]
        sizes = [y.shape[-1] for y, _ in passes]
        backwards = [backward for _, backward in passes]

        def backward(dy: Array, grads: Views, wants_dx: bool) -> Array | None:
            parts = kernels.split_channels(dy, sizes)
            found = [
                branch_backward(part, grads.get(name, {}), wants_dx)
                for (name, _), branch_backward, part in zip(self.layers, backwards, parts, strict=True)
            ]
            return kernels.total(found) if wants_dx else None

        return kernels.join_channels([y for y, _ in passes]), backward


def _check_layers(block: str, layers: Sequence[Layer]) -> None:
    for i, layer in enumerate(layers, start=1):
        if not is_layer(layer):
            raise UsageError(f"{block} is made of layers, but argument {i} is {kind_of(layer)}")
