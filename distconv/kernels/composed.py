"""What is made of a device's other functions, where the device has no kernels of its own for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from distconv.kernels.interface import Array

# (dy, dw, dgamma, dbeta, wants_dx, onto) -> (dx, dbeside)
ConvNormBackward = Callable[[Array, Array, Array, Array, bool, "Array | None"], "tuple[Array | None, Array]"]


class Composed:
    """A part of a device's Kernels."""

    def conv_norm(
        self: Any, x: Array, w: Array, gamma: Array, beta: Array, epsilon: float, stride: int, pad: int, relu: bool,
        beside: Array | None = None
    ) -> tuple[Array, Array, Array, ConvNormBackward]:  # fmt: skip
        """A convolution without bias, batch norm, beside (N, OH, OW, F) added if there is one and, if asked, ReLU.

        x (N, H, W, C), w (K, K, C, F), gamma and beta (F,). Returns y (N, OH, OW, F), mean and variance (F,) of what
        the convolution gave, and the adjoint: add to dw, dgamma and dbeta, return dx (N, H, W, C), None if it is not
        wanted, and dbeside (N, OH, OW, F). onto (N, H, W, C), if there is one, is added to dx.
        """
        c = self.conv_forward(x, w, None, stride, pad, False)
        inner, behind = relu and beside is None, None
        y, mean, variance = self.norm_forward(c, gamma, beta, epsilon, inner)
        if beside is not None:
            y = self.plus(y, beside, relu)
            behind = y if relu else None  # a y that is not needed is not kept

        def backward(
            dy: Array, dw: Array, dgamma: Array, dbeta: Array, wants_dx: bool, onto: Array | None
        ) -> tuple[Array | None, Array]:
            if behind is not None:
                dy = self.relu_backward(dy, behind)
            dc = self.norm_backward(c, dy, gamma, beta, mean, variance, epsilon, inner, dgamma, dbeta)
            dx = self.conv_backward(x, c, dc, w, stride, pad, False, dw, None, wants_dx)
            return self.plus(dx, onto, False) if wants_dx and onto is not None else dx, dy

        return y, mean, variance, backward

    def total(self: Any, parts: Sequence[Array]) -> Array:
        """The sum of arrays of one shape, in their order."""
        return functools.reduce(lambda a, b: self.plus(a, b, False), parts)
