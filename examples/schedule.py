"""A learning rate that warms up and then falls along a cosine, and weights that decay while biases do not.

The rule is Adam's; with decoupled weight decay that is AdamW (Loshchilov and Hutter 2019). Which arrays decay, their
Spec says: those of Conv and Affine do, but for the biases.

    mpirun -n 2 python -m distconv.train --data digits --optimizer examples.schedule:adamw --lr 0.002 --epochs 10
"""

from __future__ import annotations

import math

from distconv.nn.optimizers import Adam

WARM_UP = 20  # steps
WEIGHT_DECAY = 0.05


def adamw(lr, steps):
    """Adam for a run of so many steps, its learning rate lr at the most."""

    def rate(t):
        """Of step t, counted from 1."""
        if t <= WARM_UP:
            return lr * t / WARM_UP
        return lr * (1 + math.cos(math.pi * min(1, (t - WARM_UP) / (steps - WARM_UP)))) / 2

    return Adam(rate, weight_decay=WEIGHT_DECAY)
