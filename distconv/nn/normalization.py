"""Layers that bring numbers to mean 0 and deviation 1, channel by channel: by their batch, or by the training set."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from distconv.kernels.interface import Array
from distconv.nn.layers import Backward, Context, Conv, Layer, check_switch, inner_layers, kept_nothing
from distconv.nn.parameters import Shape, Spec, Specs, Views, is_within


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167) of each channel, the last axis; if asked, ReLU.

    In training, mean and variance are those of the samples of this forward pass: a rank's part of the batch, or with
    --shards that of a shard (ghost batch normalisation, Hoffer et al. 2017, arXiv 1705.08741). So a layer waits for no
    other rank, and shards have the same statistics on any number of ranks. In a step, the running mean and the running
    variance (unbiased, as everybody's) go `momentum` of the way to those of the batch; evaluation normalises by them.
    """

    relu: bool = False
    epsilon: float = 1e-5
    momentum: float = 0.1

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        C = _channels(self, input_shape)
        check_switch(self, "relu", self.relu)
        if not is_within(self.epsilon, sys.float_info.min, sys.float_info.max):
            raise ValueError(f"{self}: epsilon must be a number above 0, or a variance of 0 would be divided by")
        if not is_within(self.momentum, 0, 1):
            raise ValueError(f"{self}: momentum must lie in 0 to 1")
        return input_shape, {
            "gamma": Spec(C, mean=1.0, decay=False),
            "beta": Spec(C, decay=False),
            "mean": Spec(C, trained=False),
            "variance": Spec(C, mean=1.0, trained=False),
        }

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        kernels, gamma, beta = context.kernels, params["gamma"], params["beta"]
        if not context.training:
            factor, offset = kernels.norm_factors(gamma, beta, params["mean"], params["variance"], self.epsilon)
            return kernels.scale_channels(x, factor, offset, self.relu), kept_nothing
        y, *batch = kernels.norm_forward(x, gamma, beta, self.epsilon, self.relu)

        def backward(dy: Array, grads: Views, wants_dx: bool) -> Array:
            self.follow(batch, x.shape, params, grads, context)
            dx: Array = kernels.norm_backward(
                x, dy, gamma, beta, *batch, self.epsilon, self.relu, grads["gamma"], grads["beta"]
            )
            return dx

        return y, backward

    def follow(
        self, batch: Sequence[Array], shape: Sequence[int], params: Views, grads: Views, context: Context
    ) -> None:
        """Add to the gradients of the running statistics what brings them `momentum` of the way to those of a batch.

        batch: mean and variance (C,) of numbers of this shape (N, ..., C).
        """
        M, share = math.prod(shape[:-1]), self.momentum * shape[0] / context.global_batch
        names, unbiased = ("mean", "variance"), M / max(1, M - 1)
        there, running = (tuple(views[name] for name in names) for views in (grads, params))
        context.kernels.norm_follow(*there, *running, *batch, share, unbiased)


@dataclass(frozen=True)
class ConvNorm:
    """A convolution without bias, BatchNorm and ReLU, (H, W, C) -> (OH, OW, F): what deep networks are built of.

    In evaluation the normalisation is folded into the filters and a bias, so it costs nothing.
    """

    filters: int
    size: int = 3
    stride: int = 1
    pad: int | str = "same"
    relu: bool = True
    momentum: float = 0.1  # BatchNorm's

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        shape, specs = self.conv.shapes(input_shape)
        return shape, {"W": specs["W"], **self.norm.shapes(shape)[1]}

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        kernels, conv, norm, w = context.kernels, self.conv, self.norm, params["W"]
        if not context.training:
            factor, offset = kernels.norm_factors(
                params["gamma"], params["beta"], params["mean"], params["variance"], norm.epsilon
            )
            folded = kernels.scale_channels(w, factor, kernels.device.zeros(self.filters, x.dtype), False)
            return kernels.conv_forward(x, folded, offset, conv.stride, conv.margin, self.relu), kept_nothing
        y, backward = self.train(x, params, context)
        return y, lambda dy, grads, wants_dx: backward(dy, grads, wants_dx, None)[0]

    def train(
        self, x: Array, params: Views, context: Context, beside: Array | None = None, relu: bool = False
    ) -> tuple[Array, Callable[..., tuple[Array | None, Array]]]:
        """The forward pass in training; what lies beside, if anything, is added, and then relu says whether ReLU comes.

        Its backward pass takes, besides, what is to be added to dx, and returns dx and the gradient of what lay beside.
        """
        relu = self.relu if beside is None else relu
        kernels, conv, norm, w = context.kernels, self.conv, self.norm, params["W"]
        of_norm = params["gamma"], params["beta"], norm.epsilon
        y, *batch, kernel_backward = kernels.conv_norm(x, w, *of_norm, conv.stride, conv.margin, relu, beside)
        shape = y.shape  # which is all that is kept of y here

        def backward(dy: Array, grads: Views, wants_dx: bool, onto: Array | None) -> tuple[Array | None, Array]:
            norm.follow(batch, shape, params, grads, context)
            of_params = grads["W"], grads["gamma"], grads["beta"]
            found: tuple[Array | None, Array] = kernel_backward(dy, *of_params, wants_dx, onto)
            return found

        return y, backward

    @property
    def conv(self) -> Conv:
        return Conv(self.filters, self.size, self.stride, self.pad)

    @property
    def norm(self) -> BatchNorm:
        return BatchNorm(self.relu, momentum=self.momentum)


@dataclass(frozen=True)
class Standardize:
    """(x - mean) / deviation of each channel, over all pixels of the training images, (..., C) -> (..., C).

    Both are a part of the model: saved with it, and used on whatever it judges.
    """

    is_fixed: ClassVar[bool] = True  # its backward pass brings dx and nothing else

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        C = _channels(self, input_shape)
        mean = Spec(C, trained=False, of_data="channel_means")
        return input_shape, {"mean": mean, "deviation": replace(mean, mean=1.0, of_data="channel_deviations")}

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        kernels = context.kernels
        factor = 1 / params["deviation"]
        y: Array = kernels.scale_channels(x, factor, -params["mean"] * factor, False)

        def backward(dy: Array, grads: Views, wants_dx: bool) -> Array | None:
            nothing = kernels.device.zeros(x.shape[-1], x.dtype)
            return kernels.scale_channels(dy, factor, nothing, False) if wants_dx else None

        return y, backward


def _channels(layer: object, input_shape: Shape) -> Shape:
    if not input_shape:
        raise ValueError(f"{layer} needs channels, but what comes in has shape {input_shape}")
    return input_shape[-1:]


def takes_statistics(model: Layer) -> bool:
    """Whether a model has batch norm, so that what it computes of a sample hangs on the others beside it."""
    return isinstance(model, BatchNorm | ConvNorm) or any(takes_statistics(layer) for _, layer in inner_layers(model))
