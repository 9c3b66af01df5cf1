"""Pooling by means; MaxPool is in layers.py."""

from __future__ import annotations

from dataclasses import dataclass

from distconv.kernels.interface import Array
from distconv.nn.layers import Backward, Context, image_shape, window_grid
from distconv.nn.parameters import Shape, Specs, Views


@dataclass(frozen=True)
class AveragePool:
    """Mean of each window, zeros of the padding among its size x size numbers, (H, W, C) -> (OH, OW, C)."""

    size: int = 2
    stride: int = 2
    pad: int = 0

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        H, W, C = image_shape(self, input_shape)
        return (*window_grid(self, H, W, self.size, self.stride, self.pad), C), {}

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        kernels, window = context.kernels, (self.size, self.stride, self.pad)
        y = kernels.average_pool_forward(x, *window)
        return y, lambda dy, grads, wants_dx: kernels.average_pool_backward(dy, *window, x.shape)


@dataclass(frozen=True)
class GlobalAveragePool:
    """Mean of each channel of an image, (H, W, C) -> (C,) (Lin et al. 2014, arXiv 1312.4400)."""

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        return image_shape(self, input_shape)[2:], {}

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        kernels = context.kernels
        return kernels.pixel_mean(x), lambda dy, grads, wants_dx: kernels.pixel_mean_backward(dy, x.shape)
