"""A small network in plain NumPy, trained on all ranks: somebody's own loop, and two lines of distconv in it.

    OMP_NUM_THREADS=1 mpirun -n 4 python examples/numpy_loop.py

Every rank holds the same parameters and draws the same batches. It computes the gradient of its share of a batch; the
sum over the ranks is the gradient of the whole batch, to the same bits on each, so the parameters stay the same. Any
number of ranks ends in the same loss, but for the rounding of the float16 wire: within 0.5 %.
OMP_NUM_THREADS is for NumPy: ranks whose matrix products each use all cores take them from one another.
"""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

import distconv
from distconv.data import digits

STEPS, BATCH, HIDDEN, RATE = 300, 100, 64, 0.1


def forward(parameters: list[np.ndarray], images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, pixels) -> the hidden layer (N, HIDDEN), and the logarithms of the classes' probabilities (N, 10)."""
    w1, b1, w2, b2 = parameters
    hidden = np.maximum(images @ w1 + b1, 0)
    scores = hidden @ w2 + b2
    scores -= scores.max(axis=1, keepdims=True)
    return hidden, scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def gradients(
    parameters: list[np.ndarray], images: np.ndarray, labels: np.ndarray, whole_batch: int
) -> list[np.ndarray]:
    """Of the summed loss of these images, divided by the size of the whole batch; one array for each parameter."""
    hidden, logarithms = forward(parameters, images)
    d_scores = np.exp(logarithms)
    d_scores[np.arange(len(labels)), labels] -= 1
    d_scores /= whole_batch
    d_hidden = d_scores @ parameters[2].T * (hidden > 0)
    return [images.T @ d_hidden, d_hidden.sum(axis=0), hidden.T @ d_scores, d_scores.sum(axis=0)]


def main() -> None:
    comm, random, data = MPI.COMM_WORLD, np.random.default_rng(0), digits.load()
    images = data.train_images.reshape(len(data.train_labels), -1).astype(np.float32) / 255
    labels = data.train_labels
    shapes = (images.shape[1], HIDDEN), (HIDDEN,), (HIDDEN, 10), (10,)
    parameters = [(random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32) for shape in shapes]

    with distconv.Allreduce(comm, sum(p.size for p in parameters)) as allreduce:  # the first line
        for _ in range(STEPS):
            batch = random.choice(len(labels), BATCH, replace=False)  # the same on all ranks
            mine = batch[comm.rank :: comm.size]
            gradient = gradients(parameters, images[mine], labels[mine], BATCH)
            allreduce.sum(gradient)  # the second
            for parameter, slope in zip(parameters, gradient, strict=True):
                parameter -= RATE * slope

    logarithms = forward(parameters, images)[1]
    loss = -logarithms[np.arange(len(labels)), labels].mean()
    if comm.rank == 0:
        print(f"{comm.size} ranks ({allreduce.how}): loss {loss:.6f}")


if __name__ == "__main__":
    main()
