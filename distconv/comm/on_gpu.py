"""The sum over the ranks of gradients that lie on GPUs.

Two ways. `Staged` brings a gradient over the bus to the host, where an exchange of exchange.py sums it, with any MPI,
and brings the sum back; on the float16 wire it crosses the bus as halves too, so a rank's own part is rounded there,
which on the CPU it is not. `OnGpu` sums where the gradients are, with the algorithm of exchange.Flat and to its bits;
what travels, goes through NCCL or through an MPI that takes addresses of the GPU.

Both leave to the host what only it can do, in `travel`. `before` and `after` only start work on the device, so a step
can be recorded as a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from distconv.comm.exchange import HEADER, Exchange, Flat, Headers, part_size, parts
from distconv.comm.on_cpu import DeviceExchange
from distconv.comm.shared_memory import mpi_of
from distconv.comm.wire import WIRES
from distconv.comm.world import World, cuda_aware_mpi
from distconv.errors import UsageError
from distconv.kernels.gpu.arithmetic import Gpu
from distconv.kernels.interface import FINITE, Array

if TYPE_CHECKING:
    from mpi4py import MPI


class Staged(DeviceExchange):
    """Through the host, by one of its exchanges. K: vectors of this rank, for an exact wire."""

    needs_no_host = False

    def __init__(self, gpu: Gpu, size: int, inner: Exchange, K: int = 1) -> None:
        self.gpu, self.size, self.inner, self.wire = gpu, size, inner, inner.wire
        self.halves = inner.wire.name == "float16"
        self.part = part_size(size, 1)
        nbytes = inner.wire.nbytes(self.part) if self.halves else 4 * size * K
        self.here, self.there = gpu.device.pinned(nbytes), gpu.device.empty(nbytes, np.uint8)
        self.vector = np.zeros(size, np.float32) if self.halves else self.here.view(np.float32)
        on_bus = "float16" if self.halves else "float32"
        self.how = f"{inner.how}, {on_bus} over the bus to the host"
        self.bytes_sent, self.bus_bytes = inner.bytes_sent, nbytes + nbytes // K

    @property
    def waited(self) -> float:
        return self.inner.waited

    def before(self, vector: Array, bad: Array) -> None:
        if self.halves:
            message = self.there.view(np.uint16)
            self.gpu.launch("wire", "encode", self.size, vector, message, self.size, self.part, 0, bad[:1])
            self.gpu.device.copy(self.here, self.there)
        else:
            self.gpu.device.copy(self.here, vector)

    def travel(self, header: Headers) -> Headers:
        if not self.halves:
            return self.inner.sum(self.vector, header)
        self.wire.decode(self.here, self.vector)
        headers = self.inner.sum(self.vector, header)
        self.wire.encode(self.vector, self.here)
        return headers

    def after(self, vector: Array, bad: Array) -> None:
        if self.halves:
            self.gpu.device.copy(self.there, self.here)
            message = self.there.view(np.uint16)
            self.gpu.launch("wire", "decode", self.size, message, vector, self.size, self.part, 0, bad[1:])
        else:
            self.gpu.device.copy(vector, self.here[: 4 * self.size])
            self.gpu.launch("wire", "find_bad", self.size, vector, self.size, bad[1:])


class Transport(Protocol):
    """Carries bytes between devices: a message to each rank, then one to all."""

    name: str
    needs_no_host: bool

    def scatter(self, outgoing: Array, received: Array) -> None:
        """Row r of outgoing (P, nbytes) goes to rank r, which gets it as row `own rank` of received (P, nbytes)."""
        ...

    def gather(self, mine: Array, gathered: Array) -> None:
        """mine (nbytes,), which is this rank's row of gathered (P, nbytes), becomes that row on every rank."""
        ...


class CudaMpi:
    """An MPI that takes addresses of the GPU. With any other, this is a segmentation fault."""

    name = "MPI, from GPU to GPU"
    needs_no_host = False

    def __init__(self, comm: MPI.Comm, device: Any) -> None:
        self.comm, self.device = comm, device

    def scatter(self, outgoing: Array, received: Array) -> None:
        self.device.synchronize()  # MPI does not know the stream
        self.comm.Alltoall(outgoing, received)

    def gather(self, mine: Array, gathered: Array) -> None:
        self.device.synchronize()
        self.comm.Allgather(mpi_of(self.comm).IN_PLACE, gathered)


class OneRank(DeviceExchange):
    """A rank that is alone: its gradient becomes what the wire makes of it, to the bits of Flat."""

    wire, how = WIRES["float16"], "on the GPUs, one rank"
    bytes_sent = bus_bytes = 0
    needs_no_host = True

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def before(self, vector: Array, bad: Array) -> None:
        self.gpu.launch("wire", "round_trip", vector.size, vector, vector.size, bad)

    def travel(self, header: Headers) -> Headers:
        return np.array([header], HEADER)

    def after(self, vector: Array, bad: Array) -> None:
        pass


class OnGpu(DeviceExchange):
    """Every rank exchanges halves with every rank, and owns a part of the vector, which its GPU adds up."""

    wire = WIRES["float16"]
    bus_bytes = 0  # through the host

    def __init__(self, comm: MPI.Comm, gpu: Gpu, size: int, transport: Transport) -> None:
        P, device = comm.size, gpu.device
        self.comm, self.gpu, self.size, self.transport = comm, gpu, size, transport
        self.needs_no_host, self.how = transport.needs_no_host, f"on the GPUs, {transport.name}"
        self.part, self.own = part_size(size, P), parts(size, P)[comm.rank]
        nbytes = self.wire.nbytes(self.part)
        self.stride = nbytes // 2  # of 16 bits
        self.outgoing, self.received, self.gathered = (device.zeros((P, nbytes), np.uint8) for _ in range(3))
        self.mine = self.gathered[comm.rank]
        self.bytes_sent = (P - 1) * (2 * nbytes + HEADER.itemsize)

    def before(self, vector: Array, bad: Array) -> None:
        arguments = vector, self.outgoing.view(np.uint16), self.size, self.part, self.stride, bad[:1]
        self.gpu.launch("wire", "encode", self.size, *arguments)
        self.vector = vector
        if self.needs_no_host:
            self._sum()

    def _sum(self) -> None:
        own = self.vector[self.own]
        self.transport.scatter(self.outgoing, self.received)
        arguments = own, self.comm.rank, self.comm.size, self.received.view(np.uint16), self.stride, self.part
        self.gpu.launch("wire", "sum_and_encode", own.size, *arguments, self.mine.view(np.uint16), own.size)
        self.transport.gather(self.mine, self.gathered)

    def travel(self, header: Headers) -> Headers:
        if not self.needs_no_host:
            self._sum()
        headers = np.zeros((self.comm.size, HEADER.itemsize), np.uint8)
        self.comm.Allgather(np.frombuffer(header.tobytes(), np.uint8), headers)
        return headers.reshape(-1).view(HEADER)

    def after(self, vector: Array, bad: Array) -> None:
        arguments = self.gathered.view(np.uint16), vector, self.size, self.part, self.stride, bad[1:]
        self.gpu.launch("wire", "decode", self.size, *arguments)


def choose_on_gpu(
    world: World, gpu: Gpu, size: int, wire: str, kind: str, shared: bool, connect: Callable[[], Exchange], K: int = 1
) -> DeviceExchange:
    """The exchange of that kind for vectors (size,) on the ranks' GPUs; collective.

    auto: on the GPU where the rank is alone, through NCCL where every rank has a GPU of its own and NCCL has shown here
    that it sums as it should, else staged; `how` says why. The kinds of the host are staged; connect makes the host's
    exchange. shared: a GPU has several ranks. K: vectors of this rank. Raises UsageError, on all ranks alike, for one
    that this job cannot have.
    """
    if kind == "cuda-mpi":
        problem = first_problem(world, _needs_halves(wire) or cuda_aware_mpi())
        if problem:
            raise UsageError(f"--exchange cuda-mpi: {problem}; use --exchange auto")
        return OnGpu(world.comm, gpu, size, CudaMpi(world.comm, gpu.device))
    if kind == "auto" and world.size == 1 and wire == "float16":
        return OneRank(gpu)
    if kind in ("auto", "nccl"):
        found = by_nccl(world, gpu, size, wire, shared)
        if isinstance(found, OnGpu):
            return found
        if kind == "nccl":
            raise UsageError(f"--exchange nccl: {found}; use --exchange auto")
    staged = Staged(gpu, size, connect(), K)
    if kind == "auto" and world.size > 1:
        staged.how += f", as NCCL cannot be used: {found}"
    return staged


def by_nccl(world: World, gpu: Gpu, size: int, wire: str, shared: bool) -> OnGpu | str:
    """The exchange through NCCL, tried on a vector and held against Flat, or why it cannot be; collective."""
    problem = _needs_halves(wire) or ("several ranks share a GPU" if shared else gpu.device.nccl_problem())
    if problem := first_problem(world, problem):
        return problem
    # A rank that fails to join lets the others wait for it, in training until the watch ends the job. So what can be
    # found out is found out before.
    version, identity, exchange = "", None, None
    try:
        version = gpu.device.nccl_version()
        identity = gpu.device.nccl_identity() if world.rank == 0 else None
    except Exception as error:  # NCCL's own, of many kinds
        problem = f"it does not start ({error})"
    versions = world.comm.allgather(version)
    if problem := first_problem(world, problem):
        return problem
    if len(set(versions)) > 1:
        return f"ranks have different versions of it ({', '.join(sorted(set(versions)))})"
    identity = world.comm.bcast(identity)
    try:
        exchange = OnGpu(world.comm, gpu, size, gpu.device.nccl(world.size, world.rank, identity))
    except Exception as error:
        problem = f"it does not start ({error})"
    if (problem := first_problem(world, problem)) or exchange is None:
        return problem or "it does not start"
    return first_problem(world, _differs(world, gpu, size, exchange)) or exchange


def _differs(world: World, gpu: Gpu, size: int, exchange: OnGpu) -> str | None:
    """How the exchange differs from Flat, with which it shares every bit, on a vector of this rank's; collective."""
    vector = np.random.default_rng(world.rank).standard_normal(size).astype(np.float32)
    problem, bad = None, gpu.device.upload(np.full(2, FINITE, np.int32))
    try:
        there = gpu.device.upload(vector)
        exchange.before(there, bad)
        exchange.after(there, bad)
        found = gpu.device.download(there)
    except Exception as error:
        problem, found = f"it fails ({error})", np.zeros_like(vector)
    flat = Flat(world.comm, size, exchange.wire)
    flat.sum(vector, np.zeros((), HEADER))
    flat.close()
    wrong = int(np.count_nonzero(found.view(np.uint32) != vector.view(np.uint32)))
    if problem is None and wrong:
        problem = f"{wrong:,} of {size:,} of its sums differ from those of the host"
    return problem


def _needs_halves(wire: str) -> str | None:
    return None if wire == "float16" else f"sums on the GPU are for --wire float16, not {wire}"


def first_problem(world: World, problem: str | None) -> str | None:
    """The first problem that a rank has, the same on all; collective."""
    problems = [(rank, text) for rank, text in enumerate(world.comm.allgather(problem)) if text]
    if not problems:
        return None
    rank, text = problems[0]
    return text if len(problems) == world.size else f"rank {rank}: {text}"
