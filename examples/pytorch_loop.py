"""A small PyTorch network, trained on all ranks by MPI alone: gradients go through distconv by their NumPy arrays.

    mpirun -n 4 python examples/pytorch_loop.py

The arrays share the tensors' memory, so what the optimizer sees is the sum over the ranks. Any number of ranks ends in
the same loss, but for the rounding of the float16 wire: within 0.5 %.
"""

from __future__ import annotations

import torch
from mpi4py import MPI

import distconv
from distconv.data import digits

STEPS, BATCH = 100, 100


def main() -> None:
    comm, data = MPI.COMM_WORLD, digits.load()
    torch.set_num_threads(1)  # a core for each rank
    torch.manual_seed(0)  # the same parameters and batches on all ranks
    images = torch.from_numpy(data.train_images.reshape(-1, 1, 28, 28)).float() / 255
    labels = torch.from_numpy(data.train_labels).long()
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 5, stride=2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 12 * 12, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    with distconv.Allreduce(comm, sum(p.numel() for p in model.parameters())) as allreduce:
        for _ in range(STEPS):
            batch = torch.randperm(len(labels))[:BATCH]
            mine = batch[comm.rank :: comm.size]
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images[mine]), labels[mine], reduction="sum") / BATCH
            loss.backward()
            allreduce.sum([p.grad.numpy() for p in model.parameters()])
            optimizer.step()

    with torch.no_grad():
        final = torch.nn.functional.cross_entropy(model(images), labels)
    if comm.rank == 0:
        print(f"{comm.size} ranks ({allreduce.how}): loss {final:.6f}")


if __name__ == "__main__":
    main()
