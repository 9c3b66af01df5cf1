"""Layers: small frozen objects of hyper-parameters. A forward pass returns its own backward pass.

A layer has two methods. `shapes` tells, for an input shape without the batch axis, its output shape and the parameters
it needs. `forward` computes y and returns it with `backward`, a function that adds to the gradients of the parameters
and returns dx. Activations live in that function, so a layer holds no state and evaluation keeps nothing.
"""

from __future__ import annotations

import math
import textwrap
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from distconv.errors import UsageError
from distconv.kernels.cpu.device import Cpu
from distconv.kernels.interface import Array, output_size
from distconv.nn.parameters import Shape, Spec, Specs, Views, check_specs, is_shape, is_whole, is_within

CPU = Cpu()

# backward(dy, grads, wants_dx): adds to grads, which are 0 when a step begins; returns dx, or None where the caller
# does not want it.
Backward = Callable[[Array, Views, bool], "Array | None"]


@dataclass(frozen=True)
class Context:
    """What a forward pass knows besides its input.

    samples (N,) are this rank's, by their indices in the whole training set; global_batch is how many all ranks have.
    Random draws are keyed by seed, step, layer and sample, so that they do not depend on which rank holds a sample.
    on_final is told, in the backward pass, the name of each layer of the model whose gradients are final, and with them
    those of all layers behind it. kernels is where the arithmetic is done, and with it what x, samples and step are: a
    kernels.cpu.device.Cpu, or a kernels.gpu.arithmetic.Gpu, on whose device they lie.
    """

    training: bool
    seed: int = 0
    step: Any = 0
    samples: Any = None
    path: str = ""
    on_final: Callable[[str], None] | None = None
    kernels: Any = CPU
    global_batch: int = 1

    def within(self, name: str) -> Context:
        """The same pass, seen by the layer called `name` inside this one."""
        path = f"{self.path}.{name}"  # dataclasses.replace would take 5 us, for each layer of each step
        return Context(
            self.training, self.seed, self.step, self.samples, path, self.on_final, self.kernels, self.global_batch
        )

    @property
    def _key(self) -> tuple[int, int]:
        if self.samples is None:
            raise ValueError("a layer that draws random numbers needs Context(samples=...), one index per image")
        return self.seed, zlib.crc32(self.path.encode())

    def uniform(self, count: int) -> Array:
        """So many random numbers from 0 to 1 for each sample -> (N, count); in all calls of a layer the same ones."""
        numbers: Array = self.kernels.uniform(count, self._key, self.step, self.samples)
        return numbers

    def drop(self, x: Array, ratio: float) -> Array:
        """x (N, ...) with each number replaced by 0 with that probability; in all calls of a layer the same ones."""
        dropped: Array = self.kernels.dropout(x, ratio, self._key, self.step, self.samples)
        return dropped


def kept_nothing(dy: Array, grads: Views, wants_dx: bool) -> Array | None:
    """What a forward pass of evaluation may return as its backward pass."""
    raise RuntimeError("evaluation keeps nothing for a backward pass: use Context(training=True)")


class Layer(Protocol):
    """What a model is made of; a model is a layer itself.

    It never talks to other ranks: where a rank has no samples, or tries a layer first for its host, the others would
    wait for it. What ranks must share goes through the gradient of an untrained parameter, see Spec.
    """

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        """Output shape and parameters for an input shape, both without the batch axis."""
        ...

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        """y and its backward pass; x has shape (N, *input_shape), and others read it, so it is not to be changed."""
        ...


def is_layer(candidate: Any) -> bool:
    """Whether this has the methods of a layer, and is not a class."""
    return not isinstance(candidate, type) and all(callable(getattr(candidate, m, None)) for m in ("shapes", "forward"))


def inner_layers(layer: Layer) -> Sequence[tuple[str, Layer]]:
    """The layers that a layer of ours is made of, by name: of a Chain, or of a block of blocks.py."""
    return getattr(layer, "layers", ()) if type(layer).__module__.startswith("distconv.nn.") else ()


def is_ours(layer: Layer) -> bool:
    """Whether this is a layer of this package, and all within it are."""
    return type(layer).__module__.startswith("distconv.nn.") and all(is_ours(one) for _, one in inner_layers(layer))


def kind_of(candidate: object) -> str:
    """What this is, for people."""
    return f"the class {candidate.__name__}" if isinstance(candidate, type) else f"a {type(candidate).__name__}"


def shapes_of(layer: Layer, input_shape: Shape) -> tuple[Shape, Specs]:
    """layer.shapes(input_shape). Raises ValueError where that is not an output shape and specs."""
    found: Any = layer.shapes(input_shape)
    kind = type(layer).__name__
    if not isinstance(found, tuple) or len(found) != 2 or not is_shape(found[0]):
        given = textwrap.shorten(repr(found), 120)
        raise ValueError(f"{kind}.shapes gave {given}, but an output shape, a tuple, and parameters were expected")
    try:
        check_specs(found[1])
    except ValueError as error:
        raise ValueError(f"{kind}.shapes: {error}") from None
    return found


def he(fan_in: int) -> float:
    """Standard deviation of initial weights before a ReLU (He et al. 2015, arXiv 1502.01852)."""
    return math.sqrt(2 / fan_in)


@dataclass(frozen=True)
class Conv:
    """2-D convolution (H, W, C) -> (OH, OW, F) with bias and, if asked, ReLU.

    pad: zeros around an image, or "same", which is size // 2: at stride 1 the output is as large as the input.
    deviation: of the normal initial weights; None takes He's.
    """

    filters: int
    size: int = 3
    stride: int = 1
    pad: int | str = 0
    relu: bool = False
    deviation: float | None = None

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        H, W, C = image_shape(self, input_shape)
        _check_whole(self, "filters", self.filters)
        check_switch(self, "relu", self.relu)
        K, F = self.size, self.filters
        _check_whole(self, "size", K)  # before half of it is taken
        if self.pad == "same" and K % 2 == 0:
            raise ValueError(f"{self}: same padding needs a window of odd size")
        output_shape = (*window_grid(self, H, W, K, self.stride, self.margin), F)
        deviation = he(K * K * C) if self.deviation is None else self.deviation
        return output_shape, {"W": Spec((K, K, C, F), deviation), "b": Spec((F,), decay=False)}

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        kernels = context.kernels
        y = kernels.conv_forward(x, params["W"], params["b"], self.stride, self.margin, self.relu)

        def backward(dy: Array, grads: Views, wants_dx: bool) -> Any:
            w, dw, db = params["W"], grads["W"], grads["b"]
            return kernels.conv_backward(x, y, dy, w, self.stride, self.margin, self.relu, dw, db, wants_dx)

        return y, backward

    @property
    def margin(self) -> Any:
        """The padding as a number."""
        return self.size // 2 if self.pad == "same" else self.pad


@dataclass(frozen=True)
class MaxPool:
    """Largest element of each window, (H, W, C) -> (OH, OW, C). Rows that fill no window are left out."""

    size: int = 2
    stride: int = 2
    pad: int = 0

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        H, W, C = image_shape(self, input_shape)
        grid = window_grid(self, H, W, self.size, self.stride, self.pad)
        if self.pad >= self.size:
            raise ValueError(f"{self}: a window could lie in the padding alone; use a pad below the window size")
        return (*grid, C), {}

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        kernels, shape = context.kernels, x.shape
        y, winner = kernels.max_pool_forward(x, self.size, self.stride, self.pad)

        def backward(dy: Array, grads: Views, wants_dx: bool) -> Any:
            return kernels.max_pool_backward(dy, winner, self.size, self.stride, self.pad, shape)

        return y, backward


@dataclass(frozen=True)
class Affine:
    """x W + b and, if asked, ReLU; an image is flattened in (H, W, C) order first.

    deviation: of the normal initial weights; None takes He's.
    """

    outputs: int
    relu: bool = False
    deviation: float | None = None

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        _check_whole(self, "outputs", self.outputs)
        check_switch(self, "relu", self.relu)
        C = math.prod(input_shape)
        deviation = he(C) if self.deviation is None else self.deviation
        return (self.outputs,), {"W": Spec((C, self.outputs), deviation), "b": Spec((self.outputs,), decay=False)}

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        kernels, flat = context.kernels, x.reshape(len(x), params["W"].shape[0])
        y = kernels.affine_forward(flat, params["W"], params["b"], self.relu)

        def backward(dy: Array, grads: Views, wants_dx: bool) -> Any:
            dx = kernels.affine_backward(flat, y, dy, params["W"], self.relu, grads["W"], grads["b"])
            return dx.reshape(x.shape)

        return y, backward


@dataclass(frozen=True)
class ReLU:
    """max(x, 0), for where no convolution or affine layer can do it in passing: after an addition, say."""

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        return input_shape, {}

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        y = context.kernels.relu(x)
        return y, lambda dy, grads, wants_dx: context.kernels.relu_backward(dy, y)


@dataclass(frozen=True)
class Dropout:
    """The classical kind (Srivastava et al. 2014): drops with probability `ratio` in training, then x (1 - ratio)."""

    ratio: float = 0.5

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        if not is_within(self.ratio, 0, 1):
            raise ValueError(f"{self}: the ratio must lie in 0 to 1")
        return input_shape, {}

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        if context.training:
            return context.drop(x, self.ratio), lambda dy, grads, wants_dx: context.drop(dy, self.ratio)
        scale, kept = context.kernels.scale, 1 - float(self.ratio)  # a float64 of NumPy's would make float64 of x
        return scale(x, kept), lambda dy, grads, wants_dx: scale(dy, kept)


@dataclass(frozen=True, init=False)
class Chain:
    """Layers one after the other. Each is named after its kind and numbered within it: conv1, conv2, affine1."""

    layers: tuple[tuple[str, Layer], ...]

    def __init__(self, *layers: Layer) -> None:
        for i, layer in enumerate(layers, start=1):
            if not is_layer(layer):
                raise UsageError(
                    f"Chain(Conv(8), Affine(10)) is a chain of layers, but argument {i} is {kind_of(layer)}"
                )
        kinds = [type(layer).__name__.lower() for layer in layers]
        names = [f"{kind}{kinds[: i + 1].count(kind)}" for i, kind in enumerate(kinds)]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise UsageError(
                f"two layers of this chain would be named {twice[0]} and share their weights, as one's kind ends in a "
                "digit: give that class another name"
            )
        object.__setattr__(self, "layers", tuple(zip(names, layers, strict=True)))

    @classmethod
    def named(cls, layers: Iterable[tuple[str, Layer]]) -> Chain:
        """A chain of layers under names that are theirs already."""
        chain = cls()
        object.__setattr__(chain, "layers", tuple(layers))
        return chain

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        specs: dict[str, Specs] = {}
        for name, layer in self.layers:
            input_shape, specs[name] = shapes_of(layer, input_shape)
        return input_shape, specs

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        backwards: list[tuple[str, Backward]] = []
        is_fixed = [getattr(layer, "is_fixed", False) for _, layer in self.layers]
        untrained = [*is_fixed, False].index(False)  # layers at the beginning
        for name, layer in self.layers:
            x, layer_backward = layer.forward(x, params.get(name, {}), context.within(name))
            if context.training:
                backwards.append((name, layer_backward))

        def backward(dy: Any, grads: Views, wants_dx: bool) -> Array | None:
            if not context.training:
                return kept_nothing(dy, grads, wants_dx)
            first = 0 if wants_dx else untrained  # before it, nobody wants a gradient
            for i, (name, layer_backward) in reversed(list(enumerate(backwards))[first:]):
                dy = layer_backward(dy, grads.get(name, {}), wants_dx or i > first)
                if context.on_final and not context.path:  # a chain within a layer does not know what lies beside it
                    context.on_final(name)
            return dy  # type: ignore[no-any-return]

        return x, backward


def image_shape(layer: object, shape: Shape) -> tuple[int, int, int]:
    """The shape (H, W, C). Raises ValueError for one of no images."""
    if len(shape) != 3:
        raise ValueError(f"{layer} needs images (H, W, C), but what comes in has shape {shape}")
    return shape


def _check_whole(layer: object, name: str, number: Any, least: int = 1) -> None:
    if not is_whole(number) or number < least:
        raise ValueError(f"{layer}: {name} must be a whole number, at least {least}")


def check_switch(layer: object, name: str, value: Any) -> None:
    """Raise ValueError for what is neither True nor False: a number that was meant as something else, say."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{layer}: {name} is {value!r}, but True or False was expected")


def window_grid(layer: object, H: int, W: int, K: int, stride: int, pad: int) -> tuple[int, int]:
    """(OH, OW): how many windows fit. Raises ValueError where none does, or for what is no whole number."""
    _check_whole(layer, "size", K)
    _check_whole(layer, "stride", stride)
    _check_whole(layer, "pad", pad, least=0)
    grid = output_size(H, K, stride, pad), output_size(W, K, stride, pad)
    if min(grid) < 1:
        raise ValueError(f"{layer} does not fit into an image of {H} x {W}: use a smaller window or more padding")
    return grid
