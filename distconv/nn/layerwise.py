"""LARS and LAMB: optimizers for large batches, which make each array of a model move by a share of its own length.

The larger a batch, the fewer steps an epoch has, and the longer each must be. How long it may be differs from layer to
layer: here it is the length |p| of the array that sets the scale. What does not decay (biases) moves without that, as
is usual. Norms are summed up in float64 and in order, so they are the same on all ranks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import ClassVar

from distconv.kernels.cpu import updates
from distconv.kernels.interface import Array
from distconv.nn.optimizers import OPTIMIZERS, Optimizer
from distconv.nn.parameters import Spec


class Layerwise(Optimizer):
    """Base: `step` is given one array of the model. trusting: whether the array's length sets the scale.

    weight_decay is part of the formula, so nothing is multiplied by 1 - rate weight_decay besides.
    """

    layerwise: ClassVar[bool] = True
    trusting = True

    def rules(self) -> list[tuple[Optimizer, Callable[[Spec], bool]]]:
        plain = copy.copy(self)
        plain.trusting, plain.weight_decay = False, 0.0
        return [(self, lambda spec: spec.trained and spec.decay), (plain, lambda spec: spec.trained and not spec.decay)]

    def numbers(self, t: int) -> tuple[float, ...]:
        return 1.0, *self.scalars(t)


class LARS(Layerwise):
    """r = trust |p| / (|g| + decay |p|); v = a v + lr r (g + decay p); p -= v (You et al. 2017, arXiv 1708.03888)

    r is 1 where a length is 0, and for what does not decay.
    """

    slots = ("v",)
    a, trust = 0.9, 0.001

    def scalars(self, t: int) -> tuple[float, ...]:
        return (self.rate(t),)

    def step(self, p: Array, g: Array, numbers: tuple[float, ...], *state: Array) -> None:
        (lr,), (v,), r = numbers[1:], state, 1.0
        if self.trusting and (length := updates.norm(p)) and (slope := updates.norm(g)):
            r = self.trust * length / (slope + self.weight_decay * length)
        v *= self.a
        v += (lr * r) * (g + self.weight_decay * p)
        p -= v


class LAMB(Layerwise):
    """m += (1 - b1)(g - m); v += (1 - b2)(g g - v); u = m' / (sqrt(v') + eps) + decay p; p -= lr |p| / |u| u

    m' = m / (1 - b1^t), v' = v / (1 - b2^t); |p| / |u| is 1 where a length is 0, and for what does not decay (You et
    al. 2020, arXiv 1904.00962).
    """

    slots = ("m", "v")
    b1, b2, epsilon = 0.9, 0.999, 1e-6

    def scalars(self, t: int) -> tuple[float, ...]:
        return self.rate(t), 1 - self.b1**t, math.sqrt(1 - self.b2**t)

    def step(self, p: Array, g: Array, numbers: tuple[float, ...], *state: Array) -> None:
        lr, unbias1, unbias2 = numbers[1:]
        kind = p.dtype.type
        u = updates.adam_direction(
            g, *state, *map(kind, (1 - self.b1, 1 - self.b2, 1 / unbias1, 1 / unbias2, self.epsilon))
        )
        if self.weight_decay:
            u += kind(self.weight_decay) * p
        ratio = updates.norm(p) / slope if self.trusting and (slope := updates.norm(u)) else 1.0
        p -= kind(lr * (ratio or 1.0)) * u


ALL_OPTIMIZERS: dict[str, type[Optimizer]] = {**OPTIMIZERS, "lars": LARS, "lamb": LAMB}
