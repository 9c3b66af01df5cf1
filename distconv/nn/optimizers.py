"""The optimizers, each for one flat vector. They know no layers, but for the two of layerwise.py.

In the formulas p is the vector of parameters, g its gradient, t the number of this step, counted from 1; all is
element-wise. The vectors v, h or m are the optimizer's state, all zero at the start; checkpoints keep them besides p.
On a GPU, kernels/gpu/source/updates.cu does the same with the same scalars.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from numpy.typing import DTypeLike

from distconv.kernels.cpu import updates
from distconv.kernels.interface import Array
from distconv.nn.parameters import Spec

PIECE = 1 << 16  # numbers
EMA = "ema"  # no optimizer's slot, but that of the average of the weights, which stands beside theirs
EPSILON = 1e-7  # keeps the divisions finite; outside the bias correction, as in the source


class Optimizer:
    """Base: `step` changes p in place. Subclasses name their state vectors in `slots`, in the order of the formula.

    lr: the learning rate, or a schedule: a function of t that gives it. weight_decay: before a step, p is multiplied
    by 1 - rate weight_decay where its Spec says so (decoupled: Loshchilov and Hutter 2019, arXiv 1711.05101).
    """

    slots: ClassVar[tuple[str, ...]] = ()
    layerwise: ClassVar[bool] = False  # whether `step` wants the arrays of a model one by one

    def __init__(self, lr: float | Callable[[int], float], weight_decay: float = 0.0) -> None:
        self.lr, self.weight_decay = lr, weight_decay

    @property
    def kernel(self) -> str | None:
        """The name of the formula on a GPU; None where a subclass has one of its own."""
        return next((name for name, kind in OPTIMIZERS.items() if kind.update is type(self).update), None)

    def rules(self) -> list[tuple[Optimizer, Callable[[Spec], bool]]]:
        """What makes the steps of which arrays."""
        return [(self, lambda spec: spec.trained)]

    def rate(self, t: int) -> float:
        """The learning rate of step t."""
        return self.lr(t) if callable(self.lr) else self.lr

    def scalars(self, t: int) -> tuple[float, ...]:
        """The numbers of step t that the formula takes; as many at every step."""
        raise NotImplementedError

    def numbers(self, t: int) -> tuple[float, ...]:
        """What the weights that decay are multiplied by at step t, then the scalars."""
        return 1 - self.rate(t) * self.weight_decay, *self.scalars(t)

    def new_state(self, size: int, dtype: DTypeLike) -> dict[str, Array]:
        """The state at the start, for vectors (size,)."""
        return {slot: np.zeros(size, dtype) for slot in self.slots}

    def step(self, p: Array, g: Array, numbers: tuple[float, ...], *state: Array) -> None:
        """Make a step of p (size,) with the gradient g (size,), in pieces, so that temporary arrays are small."""
        for start in range(0, p.size, PIECE):
            piece = slice(start, start + PIECE)
            self.update(p[piece], g[piece], numbers[1:], *(vector[piece] for vector in state))

    def update(self, p: Array, g: Array, scalars: tuple[float, ...], *state: Array) -> None:
        """The formula, for a piece of p, g and the state vectors."""
        raise NotImplementedError


class SGD(Optimizer):
    """p -= lr g"""

    def scalars(self, t: int) -> tuple[float, ...]:
        return (self.rate(t),)

    def update(self, p: Array, g: Array, scalars: tuple[float, ...], *state: Array) -> None:
        (lr,) = scalars
        p -= lr * g


class Momentum(Optimizer):
    """v = a v - lr g; p += v (Polyak 1964)"""

    slots = ("v",)
    a = 0.9

    def scalars(self, t: int) -> tuple[float, ...]:
        return self.a, self.rate(t)

    def update(self, p: Array, g: Array, scalars: tuple[float, ...], *state: Array) -> None:
        (a, lr), (v,) = scalars, state
        v *= a
        v -= lr * g
        p += v


class Nesterov(Momentum):
    """p += a a v - (1 + a) lr g, then v = a v - lr g (Nesterov 1983, in Bengio's look-ahead form, arXiv 1212.0901)"""

    def update(self, p: Array, g: Array, scalars: tuple[float, ...], *state: Array) -> None:
        (a, lr), (v,) = scalars, state
        p += a * a * v - (1 + a) * lr * g
        v *= a
        v -= lr * g


class AdaGrad(Optimizer):
    """h += g g; p -= lr g / (sqrt(h) + eps) (Duchi et al. 2011)"""

    slots = ("h",)

    def scalars(self, t: int) -> tuple[float, ...]:
        return self.rate(t), EPSILON

    def update(self, p: Array, g: Array, scalars: tuple[float, ...], *state: Array) -> None:
        (lr, epsilon), (h,) = scalars, state
        h += g * g
        p -= lr * g / (np.sqrt(h) + epsilon)


class RMSprop(Optimizer):
    """h = d h + (1 - d) g g; p -= lr g / (sqrt(h) + eps) (Tieleman and Hinton 2012)"""

    slots = ("h",)
    d = 0.99

    def scalars(self, t: int) -> tuple[float, ...]:
        return self.d, 1 - self.d, self.rate(t), EPSILON

    def update(self, p: Array, g: Array, scalars: tuple[float, ...], *state: Array) -> None:
        (d, rest, lr, epsilon), (h,) = scalars, state
        h *= d
        h += rest * g * g
        p -= lr * g / (np.sqrt(h) + epsilon)


class Adam(Optimizer):
    """m += (1 - b1)(g - m); v += (1 - b2)(g g - v); p -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)

    Kingma and Ba 2015, arXiv 1412.6980, with the bias corrections gathered into the step size.
    """

    slots = ("m", "v")
    b1, b2 = 0.9, 0.999

    def scalars(self, t: int) -> tuple[float, ...]:
        rate = self.rate(t) * math.sqrt(1 - self.b2**t) / (1 - self.b1**t)
        return 1 - self.b1, 1 - self.b2, rate, EPSILON

    def update(self, p: Array, g: Array, scalars: tuple[float, ...], *state: Array) -> None:
        updates.adam(p, g, *state, *map(p.dtype.type, scalars))


OPTIMIZERS: dict[str, type[Optimizer]] = {
    kind.__name__.lower(): kind for kind in (SGD, Momentum, Nesterov, AdaGrad, RMSprop, Adam)
}
