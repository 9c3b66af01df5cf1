"""Where a rank computes: on which GPU, or on its cores."""

from __future__ import annotations

import pytest

from distconv.comm import placement
from distconv.comm.world import World
from distconv.errors import UsageError
from distconv.kernels.gpu.device import NOT_INSTALLED, Visible


def gpus(*identities: str, capability: int = 90) -> list[Visible]:
    return [Visible("NVIDIA Test", identity, capability) for identity in identities]


def test_a_rank_takes_the_gpu_of_its_place_on_the_host(world: World) -> None:
    found = placement.place(world, "auto", "tf32", lambda: gpus("a", "b", "c"))
    assert found.ordinal == world.local_rank % 3
    assert found.shared == (world.size > 3)
    assert ("take turns" in found.line) == found.shared
    assert len(set(world.comm.allgather(found.line))) == 1


def test_a_scheduler_that_shows_each_rank_a_gpu_of_its_own_is_understood(world: World) -> None:
    assert placement.place(world, "cuda", "float32", lambda: gpus(f"gpu {world.rank}")) == placement.Placement(
        0, False, placement.place(world, "cuda", "float32", lambda: gpus(f"gpu {world.rank}")).line
    )
    assert placement.place(world, "cuda", "float32", lambda: gpus("the only one")).shared == (world.size > 1)


def test_all_ranks_compute_on_gpus_or_none_does(world: World) -> None:
    def visible() -> list[Visible]:
        if world.rank == world.size - 1:
            raise RuntimeError("CUDA finds no GPU (no driver)")
        return gpus("a", "b")

    found = placement.place(world, "auto", "float32", visible)
    assert found.ordinal is None
    assert found.line == f"computing on the CPU, as on rank {world.size - 1} CUDA finds no GPU (no driver)"
    with pytest.raises(UsageError, match="--device cuda: CUDA finds no GPU"):
        placement.place(world, "cuda", "float32", visible)
    assert placement.place(world, "cpu", "float32", visible).ordinal is None


def test_a_machine_without_cupy_is_not_talked_about(world: World) -> None:
    def visible() -> list[Visible]:
        raise RuntimeError(NOT_INSTALLED)

    assert placement.place(world, "auto", "float32", visible) == placement.Placement(None)


def test_a_gpu_too_old_for_the_precision_is_a_usage_error(world: World) -> None:
    with pytest.raises(
        UsageError, match=r"NVIDIA Test has compute capability 7.5, and 8.0 is needed; use --device cpu"
    ):
        placement.place(world, "auto", "tf32", lambda: gpus("a", capability=75))
