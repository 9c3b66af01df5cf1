"""Six optimizers, each for one flat vector. They know no layers.

In the formulas p is the vector of parameters, g its gradient, t the number of this step, counted from 1; all is
element-wise. `state` holds what a checkpoint must keep besides p: the vectors v, h or m, all zero at the start. On a
GPU, kernels/cuda_source/updates.cu does the same with the same scalars.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from numpy.typing import DTypeLike

from distconv.kernels.cpu import updates
from distconv.kernels.interface import Array

PIECE = 1 << 16  # numbers
EPSILON = 1e-7  # keeps the divisions finite; outside the bias correction, as in the source


class Optimizer:
    """Base: `step` changes p in place. Subclasses name their state vectors in `slots`, in the order of the formula."""

    slots: ClassVar[tuple[str, ...]] = ()

    def __init__(self, size: int, dtype: DTypeLike, lr: float) -> None:
        self.lr = lr
        self.state = {slot: np.zeros(size, dtype) for slot in self.slots}

    def scalars(self, t: int) -> tuple[float, ...]:
        """The numbers of step t that the update takes."""
        raise NotImplementedError

    def step(self, p: Array, g: Array, t: int) -> None:
        """Make step t of p (size,) with the gradient g (size,), in pieces, so that temporary arrays are small."""
        for start in range(0, p.size, PIECE):
            piece = slice(start, start + PIECE)
            self.update(p[piece], g[piece], t, *(vector[piece] for vector in self.state.values()))

    def update(self, p: Array, g: Array, t: int, *state: Array) -> None:
        """Do the same with a piece of p, g and the state vectors."""
        raise NotImplementedError


class SGD(Optimizer):
    """p -= lr g"""

    def scalars(self, t: int) -> tuple[float, ...]:
        return (self.lr,)

    def update(self, p: Array, g: Array, t: int, *state: Array) -> None:
        p -= self.lr * g


class Momentum(Optimizer):
    """v = a v - lr g; p += v (Polyak 1964)"""

    slots = ("v",)
    a = 0.9

    def scalars(self, t: int) -> tuple[float, ...]:
        return self.a, self.lr

    def update(self, p: Array, g: Array, t: int, *state: Array) -> None:
        (v,) = state
        v *= self.a
        v -= self.lr * g
        p += v


class Nesterov(Optimizer):
    """p += a a v - (1 + a) lr g, then v = a v - lr g (Nesterov 1983, in Bengio's look-ahead form, arXiv 1212.0901)"""

    slots = ("v",)
    a = 0.9

    def scalars(self, t: int) -> tuple[float, ...]:
        return self.a, self.lr

    def update(self, p: Array, g: Array, t: int, *state: Array) -> None:
        (v,) = state
        p += self.a * self.a * v - (1 + self.a) * self.lr * g
        v *= self.a
        v -= self.lr * g


class AdaGrad(Optimizer):
    """h += g g; p -= lr g / (sqrt(h) + eps) (Duchi et al. 2011)"""

    slots = ("h",)

    def scalars(self, t: int) -> tuple[float, ...]:
        return self.lr, EPSILON

    def update(self, p: Array, g: Array, t: int, *state: Array) -> None:
        (h,) = state
        h += g * g
        p -= self.lr * g / (np.sqrt(h) + EPSILON)


class RMSprop(Optimizer):
    """h = d h + (1 - d) g g; p -= lr g / (sqrt(h) + eps) (Tieleman and Hinton 2012)"""

    slots = ("h",)
    d = 0.99

    def scalars(self, t: int) -> tuple[float, ...]:
        return self.d, 1 - self.d, self.lr, EPSILON

    def update(self, p: Array, g: Array, t: int, *state: Array) -> None:
        (h,) = state
        h *= self.d
        h += (1 - self.d) * g * g
        p -= self.lr * g / (np.sqrt(h) + EPSILON)


class Adam(Optimizer):
    """m += (1 - b1)(g - m); v += (1 - b2)(g g - v); p -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)

    Kingma and Ba 2015, arXiv 1412.6980, with the bias corrections gathered into the step size.
    """

    slots = ("m", "v")
    b1, b2 = 0.9, 0.999

    def scalars(self, t: int) -> tuple[float, ...]:
        rate = self.lr * math.sqrt(1 - self.b2**t) / (1 - self.b1**t)
        return 1 - self.b1, 1 - self.b2, rate, EPSILON

    def update(self, p: Array, g: Array, t: int, *state: Array) -> None:
        updates.adam(p, g, *state, *map(p.dtype.type, self.scalars(t)))


OPTIMIZERS: dict[str, type[Optimizer]] = {
    kind.__name__.lower(): kind for kind in (SGD, Momentum, Nesterov, AdaGrad, RMSprop, Adam)
}
