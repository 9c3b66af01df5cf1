"""The sum of gradients that lie on GPUs, which are emulated: its ways, and their choice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from distconv.comm.choose import choose
from distconv.comm.exchange import HEADER, Flat
from distconv.comm.on_cpu import DeviceExchange
from distconv.comm.on_gpu import CudaMpi, OneRank, OnGpu, Staged, choose_on_gpu
from distconv.comm.wire import WIRES
from distconv.comm.world import World
from distconv.errors import UsageError
from distconv.kernels.gpu.arithmetic import Gpu
from distconv.kernels.interface import FINITE, Array
from tests.emulator import Emulator, available
from tests.parallel.test_carriers import contribution, flat_model, header, through

pytestmark = pytest.mark.skipif(not available(), reason="no g++ to build the kernels for the CPU")
SIZES = (1, 300, 3000)


def on_gpu(world: World, gpu: Gpu, wire: str, kind: str, shared: bool) -> DeviceExchange:
    return choose_on_gpu(world, gpu, 3000, wire, kind, shared, lambda: choose(world, 3000, wire, kind))


class EmulatedNccl:
    """NCCL's part of an emulated device, by MPI; wrong: adds to what this rank receives."""

    name = "emulated NCCL"
    needs_no_host = True

    def __init__(self, world: World, device: Emulator, wrong: bool = False) -> None:
        self.world, self.device, self.wrong = world, device, wrong

    def scatter(self, outgoing: Array, received: Array) -> None:
        self.device.do(lambda: self.world.comm.Alltoall(outgoing.copy(), received))

    def gather(self, mine: Array, gathered: Array) -> None:
        def call() -> None:
            self.world.comm.Allgather(mine.copy(), gathered)
            gathered[:, 0] += self.wrong

        self.device.do(call)


class WithNccl(Emulator):
    """An emulated device that has NCCL, unless this rank is the one with the fault."""

    def __init__(self, folder: Path, world: World, fault: str, on_rank: int) -> None:
        super().__init__(folder)
        self.world, self.fault = world, fault if world.rank == on_rank else ""

    def nccl_problem(self) -> str | None:
        return "its library is not installed" if self.fault == "missing" else None

    def nccl_version(self) -> str:
        if self.fault == "broken GPU":
            raise RuntimeError("cudaErrorIllegalAddress")
        return "2.18.1" if self.fault == "old" else "2.27.3"

    def nccl_identity(self) -> bytes:
        if self.fault == "no network":
            raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR")
        return b"identity"

    def nccl(self, size: int, rank: int, identity: bytes) -> EmulatedNccl:
        assert (size, rank, identity) == (self.world.size, self.world.rank, b"identity")
        self.world.comm.Barrier()  # a rank that does not come would let the others wait
        if self.fault == "refuses":
            raise RuntimeError("NCCL_ERROR_INVALID_USAGE")
        return EmulatedNccl(self.world, self, wrong=self.fault == "wrong")


@pytest.fixture
def gpu(folder: Path) -> Gpu:
    return Gpu(Emulator(folder))


def sum_on_device(exchange: DeviceExchange, gpu: Gpu, vector: Array, record: Array) -> tuple[Array, Array, Array]:
    """The sum, the headers, and where the sum is first not finite."""
    there, bad = gpu.device.upload(vector), gpu.device.upload(np.full(2, FINITE, np.int32))
    exchange.before(there, bad)
    record["bad_at"] = -1 if bad[0] == FINITE else bad[0]
    headers = exchange.travel(record)
    exchange.after(there, bad)
    return gpu.device.download(there), headers, bad


# the ways of a gradient


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("by_mpi", [True, False])
def test_a_sum_on_the_gpus_has_the_bits_of_one_on_the_hosts(world: World, gpu: Gpu, size: int, by_mpi: bool) -> None:
    wanted = flat_model(world.size, size, "float16", [contribution(rank, size) for rank in range(world.size)])
    transport = CudaMpi(world.comm, gpu.device) if by_mpi else EmulatedNccl(world, gpu.device)
    exchange: DeviceExchange = OnGpu(world.comm, gpu, size, transport)
    if world.size == 1 and by_mpi:
        exchange = OneRank(gpu)
    for _ in range(2):
        found, headers, _ = sum_on_device(exchange, gpu, contribution(world.rank, size), header(world))
        assert found.tobytes() == wanted.tobytes()
        assert headers["samples"].tolist() == [10 * rank for rank in range(world.size)]
        assert headers["bad_at"].tolist() == [-1] * world.size


def test_a_rank_that_is_alone_makes_of_its_zeros_what_the_hosts_make(world: World, gpu: Gpu) -> None:
    vector = contribution(0, 700)
    vector[[0, 300]], vector[256:512:2], vector[512:] = -0.0, 1e-42, -0.0
    wanted = vector.copy()
    Flat(MPI.COMM_SELF, 700, WIRES["float16"]).sum(wanted, np.zeros((), HEADER))
    found, _, _ = sum_on_device(OneRank(gpu), gpu, vector, header(world))
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("size", SIZES)
def test_halves_cross_the_bus_and_are_summed_on_the_hosts(world: World, gpu: Gpu, size: int) -> None:
    rounded = [through("float16", contribution(rank, size)) for rank in range(world.size)]
    exchange = Staged(gpu, size, Flat(world.comm, size, WIRES["float16"]))
    found, headers, _ = sum_on_device(exchange, gpu, contribution(world.rank, size), header(world))
    assert found.tobytes() == flat_model(world.size, size, "float16", rounded).tobytes()
    assert headers["busy_seconds"].tolist() == [rank / 7 for rank in range(world.size)]
    exact = np.sum([contribution(rank, size) for rank in range(world.size)], axis=0, dtype=np.float64)
    assert np.linalg.norm(found - exact) <= 5e-4 * np.linalg.norm(exact)


def test_the_float16_wire_halves_the_bytes_on_the_bus(world: World, gpu: Gpu) -> None:
    bus = {wire: Staged(gpu, 123_552, Flat(world.comm, 123_552, WIRES[wire])).bus_bytes for wire in WIRES}
    assert bus["float32"] == 2 * 4 * 123_552
    assert bus["float16"] / bus["float32"] == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("wire", ["float32", "int8"])
def test_another_wire_crosses_the_bus_as_it_is(world: World, gpu: Gpu, wire: str) -> None:
    vector = contribution(world.rank, 700)
    exchange = Staged(gpu, 700, Flat(world.comm, 700, WIRES[wire]))
    found, _, _ = sum_on_device(exchange, gpu, vector, header(world))
    Flat(world.comm, 700, WIRES[wire]).sum(vector, header(world))
    assert found.tobytes() == vector.tobytes()


@pytest.mark.parametrize("kind", ["float16", "float32", "on the GPUs"])
def test_it_is_known_which_rank_is_not_finite_and_where(world: World, gpu: Gpu, kind: str) -> None:
    vector = contribution(world.rank, 2000)
    if world.rank == world.size - 1:
        vector[[1500, 1700]] = np.inf, np.nan
    if kind == "on the GPUs":
        exchange: DeviceExchange = OnGpu(world.comm, gpu, 2000, EmulatedNccl(world, gpu.device))
        if world.size == 1:
            exchange = OneRank(gpu)
    else:
        exchange = Staged(gpu, 2000, Flat(world.comm, 2000, WIRES[kind]))
    found, headers, bad = sum_on_device(exchange, gpu, vector, header(world))
    assert headers["bad_at"].tolist() == [-1] * (world.size - 1) + [1500]
    assert np.flatnonzero(~np.isfinite(found)).tolist() == [1500, 1700]
    assert bad[1] == 1500


# which way is taken


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("", None),
        ("missing", "its library is not installed"),
        ("broken GPU", "it does not start (cudaErrorIllegalAddress)"),
        ("refuses", "it does not start (NCCL_ERROR_INVALID_USAGE)"),
        ("wrong", "of its sums differ"),
    ],
)
def test_nccl_is_taken_where_it_works_on_all_ranks(world: World, folder: Path, fault: str, reason: str | None) -> None:
    last = world.size - 1
    gpu = Gpu(WithNccl(folder, world, fault, on_rank=last))
    if world.size == 1:
        assert on_gpu(world, gpu, "float16", "auto", shared=False).how == "on the GPUs, one rank"
    elif reason is None:
        assert on_gpu(world, gpu, "float16", "auto", shared=False).how == "on the GPUs, emulated NCCL"
    else:
        exchange = on_gpu(world, gpu, "float16", "auto", shared=False)
        assert isinstance(exchange, Staged)
        assert f"as NCCL cannot be used: rank {last}: " in exchange.how and reason in exchange.how
        assert len(set(world.comm.allgather(exchange.how))) == 1
    if reason is not None:
        with pytest.raises(UsageError, match="--exchange nccl"):
            on_gpu(world, gpu, "float16", "nccl", shared=False)


def test_rank_0_may_have_nothing_by_which_the_ranks_find_each_other(world: World, folder: Path) -> None:
    gpu = Gpu(WithNccl(folder, world, "no network", on_rank=0))
    with pytest.raises(UsageError, match=r"nccl: .*it does not start \(NCCL_ERROR_SYSTEM_ERROR\)"):
        on_gpu(world, gpu, "float16", "nccl", shared=False)
    assert world.size == 1 or isinstance(on_gpu(world, gpu, "float16", "auto", shared=False), Staged)


def test_ranks_with_different_versions_of_nccl_do_not_join(world: World, folder: Path) -> None:
    gpu = Gpu(WithNccl(folder, world, "old", on_rank=world.size - 1))
    if world.size > 1:
        exchange = on_gpu(world, gpu, "float16", "auto", shared=False)
        assert "ranks have different versions of it (2.18.1, 2.27.3)" in exchange.how


def test_nccl_is_not_asked_where_ranks_share_a_gpu_or_the_wire_is_another(world: World, folder: Path) -> None:
    gpu = Gpu(WithNccl(folder, world, "", on_rank=0))
    with pytest.raises(UsageError, match="several ranks share a GPU"):
        on_gpu(world, gpu, "float16", "nccl", shared=True)
    with pytest.raises(UsageError, match="float32"):
        on_gpu(world, gpu, "float32", "nccl", shared=False)


def test_an_mpi_that_does_not_take_addresses_of_a_gpu_is_given_none(world: World, gpu: Gpu) -> None:
    with pytest.raises(UsageError, match="--exchange cuda-mpi: this MPI"):
        on_gpu(world, gpu, "float16", "cuda-mpi", shared=False)
