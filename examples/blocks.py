"""A network of one's own from the blocks of deep networks: a stem, a residual block, an inception block, a head.

    mpirun -n 2 python -m distconv.train --data digits --model examples.blocks:model --lr 0.01 --shards 2
    python -m distconv.train --data digits --model examples.blocks:model --describe

Batch norm takes its statistics from the two shards of each batch, so one rank and two train the same network.
"""

from __future__ import annotations

from distconv.nn.blocks import Branches, Residual
from distconv.nn.layers import Affine, Chain, MaxPool
from distconv.nn.normalization import ConvNorm, Standardize
from distconv.nn.pooling import GlobalAveragePool


def model(classes):
    """Takes images of 4 x 4 pixels and more, with any number of channels."""
    return Chain(
        Standardize(),  # by the mean and deviation of the training images
        ConvNorm(16),  # convolution, batch normalisation, ReLU
        Residual(
            Chain(ConvNorm(32, stride=2), ConvNorm(32, relu=False)),
            shortcut=ConvNorm(32, size=1, stride=2, relu=False),
        ),
        Branches(
            ConvNorm(16, size=1),
            Chain(ConvNorm(16, size=1), ConvNorm(32)),
            Chain(MaxPool(3, stride=1, pad=1), ConvNorm(16, size=1)),
        ),
        GlobalAveragePool(),
        Affine(classes),
    )
