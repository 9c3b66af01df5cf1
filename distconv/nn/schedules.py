"""How the learning rate changes over a run: functions of the step alone, so a run that goes on finds the same rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# The share of the rate at a share of the way from the end of the warm-up to the end of the run, both from 0 to 1.
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda way: 1.0,
    "linear": lambda way: 1 - way,
    "cosine": lambda way: (1 + math.cos(math.pi * way)) / 2,  # Loshchilov and Hutter 2017, arXiv 1608.03983
    "one-cycle": lambda way: 1 - way,
    "step": lambda way: 0.1 ** ((way >= 1 / 2) + (way >= 3 / 4)),  # as He et al. 2015, arXiv 1512.03385
    "exponential": lambda way: 0.01**way,
}
# Of --lr, for a batch of so many times the size it is meant for.
LR_RULES: dict[str, Callable[[float], float]] = {
    "none": lambda times: 1.0,
    "linear": lambda times: times,  # Goyal et al. 2017, arXiv 1706.02677: sums of gradients
    "sqrt": lambda times: math.sqrt(times),  # Krizhevsky 2014, arXiv 1404.5997: their noise; mostly right for adam
}
UP = 0.3  # of a one-cycle's steps, where no warm-up is given (Smith 2018, arXiv 1803.09820)


@dataclass(frozen=True)
class Schedule:
    """The learning rate of step t, counted from 1: up to lr by `warmup` equal rises, then down as `shape` says.

    linear, cosine and one-cycle would be at 0 one step after the last of `steps`; step divides by 10 after half and
    after three quarters of the way; exponential comes to a hundredth. A one-cycle has its warm-up by nature.
    """

    lr: float
    shape: str = "constant"
    steps: int = 1
    warmup: int = 0

    def __call__(self, t: int) -> float:
        up = self.warmup or (round(UP * self.steps) if self.shape == "one-cycle" else 0)
        if t <= up:
            return self.lr * (t / up)  # at t = up, lr to the last bit
        return self.lr * SHAPES[self.shape](min(1.0, (t - 1 - up) / max(1, self.steps - up)))
