"""What batch norm is good for: DeepConvNet's convolutions in very large batches, and 99 % of MNIST in seconds.

    mpirun -n 2 python -m distconv.train --data mnist --model examples.batch_norm:deep --shards 2 --epochs 5 \
        --batch-size 6400 --optimizer lamb --lr 0.03 --schedule linear --warmup-epochs 1 --weight-decay 0.1
    mpirun -n 2 python -m distconv.train --data mnist --model examples.batch_norm:small --shards 2 --epochs 1 \
        --batch-size 50 --lr 0.02 --schedule one-cycle --label-smoothing 0.1

Five epochs at batch 6,400 are 50 steps. That is too few for the network without batch norm, with dropout or not.
"""

from __future__ import annotations

from distconv.nn.layers import Affine, Chain, MaxPool
from distconv.nn.normalization import BatchNorm, ConvNorm

QUICK = 0.5  # of the way in a step: running statistics that go a tenth of it lag behind where steps are few and long


def deep(classes):
    """The six convolutions of DeepConvNet, and 50 hidden neurons; 101,476 parameters for MNIST."""

    def two(filters):
        return Chain(ConvNorm(filters, momentum=QUICK), ConvNorm(filters, momentum=QUICK), MaxPool())

    hidden = Chain(Affine(50), BatchNorm(relu=True, momentum=QUICK))
    return Chain(two(16), two(32), two(64), hidden, Affine(classes))


def small(classes):
    """Three convolutions, each with pooling, before the scores; 29,178 parameters for MNIST."""
    return Chain(
        ConvNorm(16),
        MaxPool(),
        ConvNorm(32),
        MaxPool(),
        ConvNorm(64),
        MaxPool(),
        Affine(classes),
    )
