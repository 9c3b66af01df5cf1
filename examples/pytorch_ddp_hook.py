"""distconv under PyTorch's DistributedDataParallel, as its communication hook.

    mpirun -n 4 python examples/pytorch_ddp_hook.py

DDP gathers gradients in buckets while the backward pass runs, and gives each bucket to the hook. All ranks meet the
same buckets in the same order. Any number of ranks that divides the batch ends in the same loss, but for the rounding
of the float16 wire: within 0.5 %.
"""

# Without `from __future__ import annotations`: DDP looks at the hook's annotations, which must be types, not strings.

import socket

import torch
import torch.distributed as dist
from mpi4py import MPI

import distconv
from distconv.data import digits

STEPS, BATCH = 100, 120


class Allreduces:
    """One Allreduce for each size of bucket, made when the first such bucket comes. The state of the hook."""

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm = comm
        self.by_size: dict[int, distconv.Allreduce] = {}

    def mean(self, vector: torch.Tensor) -> None:
        """Replace vector by its mean over the ranks. On a GPU: by a copy on the CPU, and back."""
        size = vector.numel()
        if size not in self.by_size:
            self.by_size[size] = distconv.Allreduce(self.comm, size)
        self.by_size[size].mean(vector.numpy())

    def close(self) -> None:
        for allreduce in self.by_size.values():
            allreduce.close()


def hook(allreduces: Allreduces, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    allreduces.mean(bucket.buffer())
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def join(comm: MPI.Comm) -> None:
    """Make the ranks a process group, which DDP asks for; it sends the parameters through it, once."""
    store = dist.TCPStore(socket.gethostname(), 0, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    host, port = comm.bcast((store.host, store.port) if store else None)
    store = store or dist.TCPStore(host, port)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)


def main() -> None:
    comm, data = MPI.COMM_WORLD, digits.load()
    torch.set_num_threads(1)  # a core for each rank
    torch.manual_seed(0)  # the same batches on all ranks
    images = torch.from_numpy(data.train_images.reshape(-1, 28 * 28)).float() / 255
    labels = torch.from_numpy(data.train_labels).long()
    join(comm)
    network = torch.nn.Sequential(torch.nn.Linear(28 * 28, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    model = torch.nn.parallel.DistributedDataParallel(network)
    allreduces = Allreduces(comm)
    model.register_comm_hook(allreduces, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    for _ in range(STEPS):
        batch = torch.randperm(len(labels))[:BATCH]
        mine = batch[comm.rank :: comm.size]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[mine]), labels[mine]).backward()
        optimizer.step()
    allreduces.close()

    with torch.no_grad():
        final = torch.nn.functional.cross_entropy(network(images), labels)
    if comm.rank == 0:
        print(f"{comm.size} ranks, buckets of {', '.join(map(str, allreduces.by_size))} numbers: loss {final:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
