"""What a model is made of: its layers with their shapes, parameters and operations, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from distconv.formatting import in_bytes
from distconv.nn.layers import Chain, Dropout, Layer, inner_layers, is_ours, shapes_of
from distconv.nn.normalization import BatchNorm, ConvNorm
from distconv.nn.parameters import Shape, Spec, count

FLOAT = 4  # bytes of a number


@dataclass(frozen=True)
class Part:
    """A layer that is made of no others. flops: of an image's forward pass, in matrix products; kept: bytes an image.

    What is kept for the backward pass is a layer's output, and before batch norm that of its convolution.
    """

    name: str
    layer: Layer
    output_shape: Shape
    parameters: int
    flops: int
    kept: int


def parts(layer: Layer, input_shape: Shape, name: str = "") -> Iterator[Part]:
    """The parts of a model for inputs of this shape, in the order of a forward pass; "residual1.body.conv1" is a name.

    The products of a Conv, an Affine and a layer of one's own are told by its parameter W. Raises ValueError where
    layers do not fit.
    """
    inner = inner_layers(layer)
    for within, one in inner:
        yield from parts(one, input_shape, f"{name}.{within}" if name else within)
        if isinstance(layer, Chain):  # else all of them see the same input
            input_shape, _ = shapes_of(one, input_shape)
    if not inner:
        shape, specs = shapes_of(layer, input_shape)
        w = specs.get("W")
        flops = 2 * math.prod(w.shape) * math.prod(shape[:-1]) if isinstance(w, Spec) else 0
        kept = FLOAT * math.prod(shape) * (2 if isinstance(layer, ConvNorm) else 1)
        yield Part(
            name or type(layer).__name__.lower(), layer, shape, count(specs, lambda spec: spec.trained), flops, kept
        )


def drops_scores(model: Layer) -> bool:
    """Whether the last layer of a model is Dropout: then its loss in training says little about one in evaluation."""
    if isinstance(model, Chain):
        return bool(model.layers) and drops_scores(model.layers[-1][1])
    return isinstance(model, Dropout) and model.ratio > 0


def norms_of_one_number(model: Layer, input_shape: Shape) -> list[str]:
    """The parts with batch norm to which an image brings one number a channel: of it alone, the variance is 0."""
    norms = (part for part in parts(model, input_shape) if isinstance(part.layer, BatchNorm | ConvNorm))
    return [part.name for part in norms if math.prod(part.output_shape[:-1]) == 1]


def table(model: Layer, input_shape: Shape) -> str:
    """For people: a line for each part and one for all."""
    found = list(parts(model, input_shape))
    rows = [(p.name, " x ".join(map(str, p.output_shape)), p.parameters, p.flops, p.kept) for p in found]
    rows.append(("all", "", sum(p.parameters for p in found), sum(p.flops for p in found), sum(p.kept for p in found)))
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'layer':<{width}}{'output':>18}{'parameters':>14}{'MFLOP':>12}{'KiB kept':>12}"]
    for name, shape, parameters, flops, kept in rows:
        counts = f"{parameters:>14,}" if parameters else f"{'':>14}"
        counts += f"{flops / 1e6:>12,.2f}" if flops else f"{'':>12}"
        lines.append(f"{name:<{width}}{shape:>18}{counts}{kept / 1024:>12,.1f}")
    return "\n".join(lines)


def describe(name: str, model: Layer, input_shape: Shape) -> str:
    """The table, and what its figures are."""
    found = list(parts(model, input_shape))
    step = 3 * sum(part.flops for part in found) / 1e6
    unknown = ", ".join(part.name for part in found if part.parameters and not part.flops and not is_ours(part.layer))
    missing = f"Not counted: the products of {unknown}, if any, as its shapes tell of no W.\n" if unknown else ""
    return (
        f"{name} on images of {' x '.join(map(str, input_shape))}, for each image:\n\n{table(model, input_shape)}\n\n"
        "MFLOP: of the matrix products of a forward pass, a product and a sum counted as two; a training step takes "
        f"some {step:,.{0 if step > 30 else 2}f}.\n{missing}"
        "kept: in float32, for the backward pass; an evaluation keeps nothing.\n"
        f"In memory besides: {in_bytes(FLOAT * count(model.shapes(input_shape)[1]))} of parameters, as "
        "much of gradients, and what the optimizer remembers (Adam: twice as much)."
    )
