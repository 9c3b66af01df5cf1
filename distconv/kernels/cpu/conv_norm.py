"""A convolution and the batch norm behind it, on the CPU, in as few passes through memory as it takes.

Deep networks have more numbers between their layers than a cache holds, so what they pass through costs as much as what
is computed of them. Here the statistics are taken of images that the convolution has just written; what lies beside in
a residual block is added where the normalised numbers are written; and the gradient of what the convolution gave is
never written as a whole: the convolution's backward pass has it computed for the few images that it has at hand.
"""

from __future__ import annotations

from distconv.kernels.composed import ConvNormBackward
from distconv.kernels.cpu import winograd
from distconv.kernels.cpu.normalization import mean_and_variance, no_moments, norm_gradient, normalized
from distconv.kernels.interface import Array


def conv_norm(
    x: Array, w: Array, gamma: Array, beta: Array, epsilon: float, stride: int, pad: int, relu: bool,
    beside: Array | None
) -> tuple[Array, Array, Array, ConvNormBackward]:  # fmt: skip
    """As Composed.conv_norm, for what winograd.py takes, and an image at least."""
    moments = no_moments(w.shape[3])
    c = winograd.conv_norm_forward(x, w, pad, moments)
    mean, variance = mean_and_variance(moments, c.size // c.shape[3])
    y = normalized(c, gamma, beta, mean, variance, epsilon, relu, beside)
    behind = None if beside is None else y  # so that a y that is not needed is not kept

    def backward(
        dy: Array, dw: Array, dgamma: Array, dbeta: Array, wants_dx: bool, onto: Array | None
    ) -> tuple[Array | None, Array]:
        found = norm_gradient(c, dy, behind, gamma, beta, mean, variance, epsilon, relu, dgamma, dbeta)
        return winograd.conv_norm_backward(x, found, w, pad, dw, wants_dx, onto), found.dy

    return y, mean, variance, backward
