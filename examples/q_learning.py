"""Data that the task draws itself: a Q-learner walks through a maze by what it has learned so far.

A sample is a walk, and none is kept. The data gives the random numbers of a walk, which belong to the step and the
sample, so that many ranks walk as one does; the task walks, by the network of the moment, and learns from it. What a
state is worth, a second network tells, which follows the first one slowly (Mnih et al. 2015): it is untrained state.

    python -m distconv.train --data examples.q_learning:data --model examples.q_learning:model \
        --task examples.q_learning:task --epochs 5 --batch-size 32 --lr 0.003
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from distconv.nn.layers import Affine, Chain
from distconv.nn.parameters import untrained

MAZE = np.array([list(row) for row in (".....#..", ".###.#.#", ".#...#..", ".#.###.#", ".#......", "...##.#G")])
CELLS = np.argwhere(MAZE == ".")  # where a walk may begin
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
LENGTH, EXPLORED, DISCOUNT = 16, 0.3, 0.95  # moves of a walk, the share of random ones, what a move later is worth
PACE = 0.05  # the part of the way that the slow network follows in a step


def move(cells, actions):
    """Where moves lead from cells (N, 2), and which of them to the goal; who would run into a wall stays."""
    there = np.clip(cells + MOVES[actions], 0, np.array(MAZE.shape) - 1)
    there = np.where(MAZE[tuple(there.T)][:, np.newaxis] == "#", cells, there)
    return there, MAZE[tuple(there.T)] == "G"


def seen(cells, dtype):
    """What the network sees of the cells (N, 2): a maze of zeros, but for a 1 where the walker is."""
    x = np.zeros((len(cells), *MAZE.shape, 1), dtype)
    x[np.arange(len(cells)), cells[:, 0], cells[:, 1]] = 1
    return x


class Walks:
    image_shape, classes, digest = (*MAZE.shape, 1), len(MOVES), "".join(MAZE.ravel())

    def size(self, part):
        return {"train": 3200, "test": len(CELLS)}.get(part, 0)  # walks of an epoch; a test walk begins in each cell

    def batch(self, part, samples, context):
        """Where the walks begin (N, 2), and two random numbers for each of their moves (N, LENGTH, 2)."""
        numbers = context.uniform(1 + 2 * LENGTH)
        first = samples if part == "test" else (numbers[:, 0] * len(CELLS)).astype(int)
        return CELLS[first], numbers[:, 1:].reshape(-1, LENGTH, 2)


@dataclass(frozen=True)
class WithSlowCopy:
    """A chain, and a second set of its weights that no optimizer moves."""

    inner: Any

    def shapes(self, input_shape):
        shape, specs = self.inner.shapes(input_shape)
        return shape, {"learned": specs, "slow": untrained(specs)}

    def forward(self, x, params, context):
        y, backward = self.inner.forward(x, params["learned"], context.within("learned"))
        return y, lambda dy, grads, wants_dx: backward(dy, grads["learned"], wants_dx)


class QLearning:
    """The network tells for each move the discounted reward to come: 1 where the goal is reached, which ends it."""

    sums, metric = ("loss",), "return"

    def output_shape(self, data):
        return (len(MOVES),)

    def blind_loss(self, data):
        return np.inf  # the loss grows when the network finds out that there is something to win

    def gradient(self, model, values, grads, batch, context):
        first, numbers = batch
        cells, rows, loss, slow = first, np.arange(len(first)), 0.0, values["slow"]
        for chance, choice in numbers.transpose(1, 2, 0):
            q, backward = model.forward(seen(cells, numbers.dtype), values, context)
            actions = np.where(chance < EXPLORED, (choice * len(MOVES)).astype(int), q.argmax(axis=1))
            there, won = move(cells, actions)
            to_come, _ = model.forward(seen(there, q.dtype), {"learned": slow}, context)
            error = q[rows, actions] - np.where(won, 1, DISCOUNT * to_come.max(axis=1))
            dq = np.zeros_like(q)
            dq[rows, actions] = 2 * error / (LENGTH * context.global_batch)
            backward(dq, grads, False)
            loss += (error**2).sum(dtype=np.float64) / LENGTH
            cells = np.where(won[:, np.newaxis], first, there)
        for layer, arrays in slow.items():
            for name, array in arrays.items():  # each rank adds what its walks are of all walks
                way = values["learned"][layer][name] - array
                grads["slow"][layer][name] += PACE * len(first) / context.global_batch * way
        return (loss,)

    def evaluate(self, model, values, batch, context):
        """The returns of walks that explore nothing."""
        cells, numbers = batch
        returns = np.zeros(len(cells))
        for moves in range(len(CELLS)):
            q, _ = model.forward(seen(cells, numbers.dtype), values, context)
            cells, won = move(cells, q.argmax(axis=1))
            returns[won & (returns == 0)] = DISCOUNT**moves
        return returns.sum(), len(cells)


data, task = Walks, QLearning


def model(classes):
    return WithSlowCopy(Chain(Affine(64, relu=True), Affine(classes)))
