"""A layer with untrained state: it standardises what comes in by running means, which no optimizer touches.

A layer never talks to other ranks. What its state shall move by, it adds to the state's gradient, as the share of its
own samples: the exchange adds the ranks' shares up, so that the means of many ranks are those of one.

    mpirun -n 2 python -m distconv.train --data digits --model examples.running_means:model --epochs 5
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distconv.nn.layers import Affine, Chain, Conv, MaxPool
from distconv.nn.parameters import Spec


@dataclass(frozen=True)
class Standardise:
    """(x - mean) / sqrt(variance + epsilon) for each channel, the last axis: running ones, in training too.

    Unlike batch norm, a sample's output does not depend on which others are in its batch or on its rank.
    pace: the part of the way to the batch's own mean that the running mean goes in a step.
    """

    pace: float = 0.1
    epsilon: float = 1e-3

    def shapes(self, input_shape):
        channels = input_shape[-1:]
        state = {"mean": Spec(channels, trained=False), "variance": Spec(channels, mean=1.0, trained=False)}
        return input_shape, state

    def forward(self, x, params, context):
        mean, deviation = params["mean"], np.sqrt(params["variance"] + self.epsilon)

        def backward(dy, grads, wants_dx):
            shares = x.reshape(-1, x.shape[-1]) - mean  # of each pixel
            pixels = len(shares) / len(x) * context.global_batch  # in the batch of all ranks
            grads["mean"] += self.pace * shares.sum(axis=0) / pixels
            grads["variance"] += self.pace * (shares**2 - params["variance"]).sum(axis=0) / pixels
            return dy / deviation

        return (x - mean) / deviation, backward


def model(classes):
    """A small network that standardises its input and what its first convolution gives."""
    return Chain(
        Standardise(),
        Conv(16, pad=1, relu=True),
        Standardise(),
        MaxPool(),
        Conv(32, pad=1, relu=True),
        MaxPool(),
        Affine(classes),
    )
