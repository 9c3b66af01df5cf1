"""Two networks trained in turn in one run: one draws digits from noise, the other tells them from real ones.

The model is both, one after the other: noise -> image -> score. In even steps the judge learns, in odd ones the artist
(Goodfellow et al. 2014); the gradient of the other is zero then, and the optimizer leaves alone what has none, its
moments too. The noise belongs to the step and the sample, so that many ranks draw what one does.

    mpirun -n 2 python -m distconv.train --data examples.gan:data --model examples.gan:model --task examples.gan:task \
        --optimizer examples.gan:in_turn --lr 0.0003 --batch-size 64 --epochs 600 --out runs/gan
    python -m examples.gan runs/gan/checkpoints/step-*.safetensors  # draws digits.png
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.image import imsave

from distconv.data import digits
from distconv.nn.layers import Affine, Chain, Context, Dropout
from distconv.nn.optimizers import Adam
from distconv.nn.parameters import Parameters
from distconv.run.checkpoint import load_checkpoint

NOISE, SIDE = 16, 14  # numbers that a digit is drawn from; pixels


class Digits:
    """Noise for the artist, and as many real digits for the judge."""

    image_shape, classes = (NOISE,), 1

    def __init__(self):
        self.whole = digits.load()
        self.digest, self.size = self.whole.digest, self.whole.size

    def batch(self, part, samples, context):
        real, _ = self.whole.batch(part, samples, context)
        return 2 * context.within("noise").uniform(NOISE) - 1, real[:, ::2, ::2]


@dataclass(frozen=True)
class Image:
    """Numbers (SIDE * SIDE,) as the brightness, 0 to 1, of an image."""

    def shapes(self, input_shape):
        return (SIDE, SIDE, 1), {}

    def forward(self, x, params, context):
        y = 1 / (1 + np.exp(-x))
        return y.reshape(-1, SIDE, SIDE, 1), lambda dy, grads, wants_dx: dy.reshape(x.shape) * y * (1 - y)


def model(classes):
    artist = Chain(Affine(128, relu=True), Affine(256, relu=True), Affine(SIDE * SIDE, deviation=0.05), Image())
    judge = Chain(Dropout(0.2), Affine(256, relu=True), Dropout(0.3), Affine(1))
    return Chain.named([("artist", artist), ("judge", judge)])


class InTurn:
    """The judge's score is above 0 for what it takes for real."""

    sums, metric = ("judge_loss", "artist_loss"), "taken_for_real"

    def output_shape(self, data):
        return (1,)

    def blind_loss(self, data):
        return np.inf  # who loses is not lost: the other one has learned

    def gradient(self, model, values, grads, batch, context):
        noise, real = batch
        (_, artist), (_, judge) = model.layers
        drawn, of_artist = artist.forward(noise, values["artist"], context.within("artist"))
        s_drawn, of_drawn = judge.forward(drawn, values["judge"], context.within("drawn"))
        s_real, of_real = judge.forward(real, values["judge"], context.within("real"))
        n = context.global_batch
        if context.step % 2 == 0:
            of_drawn(sigmoid(s_drawn) / n, grads["judge"], False)
            of_real(-sigmoid(-s_real) / n, grads["judge"], False)
        else:
            of_artist(of_drawn(-sigmoid(-s_drawn) / n, grads["judge"], True), grads["artist"], False)
            for layer in grads["judge"].values():  # the judge's turn is the next step
                for array in layer.values():
                    array[...] = 0
        return (softplus(s_drawn) + softplus(-s_real)).sum(dtype=np.float64), softplus(-s_drawn).sum(dtype=np.float64)

    def evaluate(self, model, values, batch, context):
        scores, _ = model.forward(batch[0], values, context)
        return np.count_nonzero(scores > 0), len(scores)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(x, 0)


class LazyAdam(Adam):
    """Adam for numbers that have a gradient in every other step; where it is 0, they and their moments stand still."""

    b1 = 0.5

    def numbers(self, t):
        return super().numbers((t + 1) // 2)

    def update(self, p, g, scalars, *state):
        has = g != 0
        some, moments = p[has], [vector[has] for vector in state]
        super().update(some, g[has], scalars, *moments)
        p[has] = some
        for vector, moved in zip(state, moments, strict=True):
            vector[has] = moved


data, task = Digits, InTurn


def in_turn(lr, steps):
    return LazyAdam(lr)


if __name__ == "__main__":
    artist = model(1).layers[0][1]
    parameters = Parameters({"artist": artist.shapes((NOISE,))[1]})
    checkpoint = load_checkpoint(Path(sys.argv[-1]))
    for name, array in parameters.named(parameters.vector).items():
        array[...] = checkpoint.tensors[f"value/{name}"]
    noise = np.random.default_rng(0).uniform(-1, 1, (20, NOISE)).astype(np.float32)
    drawn, _ = artist.forward(noise, parameters.values["artist"], Context(training=False))
    grid = np.pad(drawn[..., 0], ((0, 0), (2, 2), (2, 2))).reshape(4, 5, SIDE + 4, SIDE + 4)
    imsave("digits.png", grid.transpose(0, 2, 1, 3).reshape(4 * (SIDE + 4), -1), cmap="gray_r")
