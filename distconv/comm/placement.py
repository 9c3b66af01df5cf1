"""Which GPU a rank computes on: the one that has its place among the ranks of its host."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distconv.comm.world import World
from distconv.errors import UsageError
from distconv.kernels.gpu import device as cuda
from distconv.kernels.gpu.arithmetic import CAPABILITY


@dataclass(frozen=True)
class Placement:
    """Where this rank computes. ordinal: of its GPU, None for the CPU; shared: some GPU of the job has several ranks.

    line: what a user should know of the choice, or nothing.
    """

    ordinal: int | None
    shared: bool = False
    line: str = ""


def place(
    world: World, device: str, precision: str, visible: Callable[[], Sequence[cuda.Visible]] = cuda.visible
) -> Placement:
    """The place of this rank for `--device auto|cpu|cuda`; collective.

    All ranks compute on GPUs, or none does: auto takes them where every rank sees one. Raises UsageError, on all ranks
    alike, where cuda is asked for and cannot be, or where there is no GPU for the precision, or too old a one.
    """
    if device == "cpu":
        return _on_cpu(world, precision)
    gpus: Sequence[cuda.Visible] = ()
    problem = ""
    try:
        gpus = visible()
    except RuntimeError as error:
        problem = str(error)
    problems = world.comm.allgather(problem)
    if any(problems):
        rank, reason = next((r, text) for r, text in enumerate(problems) if text)
        with world.together():
            if device == "cuda" and world.rank == rank:
                raise UsageError(f"--device cuda: {reason}; or use --device cpu")
        no_cupy_anywhere = all(cuda.NOT_INSTALLED in text for text in problems)  # the usual machine without a GPU
        line = "" if no_cupy_anywhere else f"computing on the CPU, as on rank {rank} {reason}"
        return _on_cpu(world, precision, line)

    ordinal = world.local_rank % len(gpus)
    mine = gpus[ordinal]
    with world.together():
        if mine.capability < CAPABILITY:
            raise UsageError(
                f"--device cuda: {mine.name} has compute capability {mine.capability / 10}, and {CAPABILITY / 10} is "
                f"needed; use --device cpu"
            )
    # A host that hides GPUs from its ranks shows each of them another one as number 0: only the identities tell.
    everyone = world.comm.allgather((socket.gethostname(), mine.identity, ordinal, mine.name))
    ranks_of = Counter(identity for _, identity, _, _ in everyone)
    shared = max(ranks_of.values()) > 1  # the same on all ranks, as the choice of an exchange hangs on it
    places = Counter(f"{host} GPU {number} ({name})" for host, _, number, name in everyone)
    shown = [f"{many} on {where}" if many > 1 else where for where, many in list(places.items())[:4]]
    line = f"ranks on GPUs: {', '.join(shown)}{', ...' if len(places) > 4 else ''}"
    if shared:
        line += "; ranks that share a GPU take turns on it: as many ranks as GPUs are faster"
    return Placement(ordinal, shared, line)


def _on_cpu(world: World, precision: str, line: str = "") -> Placement:
    with world.together():
        if precision != "float32":
            raise UsageError(f"--precision {precision} is for GPUs, but these ranks compute on the CPU: use float32")
    return Placement(None, line=line)
