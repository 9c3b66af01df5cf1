"""What the launcher has told this process through its environment: all that a rank knows before MPI is started."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PROCESSES = ("hydra", "prte", "orte", "mpirun", "mpiexec", "slurmstepd", "srun", "pals", "flux")  # names of launchers

GRACE = 2  # seconds that a launcher has to end the job, as it mostly does within 0.2


class Names(NamedTuple):
    """The variables of one launcher. An empty name: it has none for that."""

    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: str


# In this order, as one launcher may start another: hydra and prterun start their daemons by srun, and what srun told
# those is still in the environment of a rank. SLURM_NTASKS is the size of an allocation, not of what runs in it.
# PMI is how hydra, srun --mpi=pmi2 and others talk to MPICH and its kin; PRRTE is what Open MPI's mpirun is made of.
LAUNCHERS = (
    Names("pmi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Names(
        "prrte",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Names("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    Names("pals", "PALS_RANKID", "PALS_NRANKS", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    Names("flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
)


@dataclass(frozen=True)
class Launched:
    """How this process was started. launcher: as in LAUNCHERS, or nothing where there is none.

    rank, size: in the job; local_rank, local_size: among the ranks of this host, 0 and None where nobody told.
    rank_name: the variable that holds the rank.
    """

    launcher: str = ""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int | None = None
    rank_name: str = ""

    @property
    def alone(self) -> bool:
        """Whether the launcher promised no other rank."""
        return self.size == 1


def launched() -> Launched:
    """What the environment says. Without a launcher, that of one rank alone."""
    for names in LAUNCHERS:
        rank, size = _number(names.rank), _number(names.size)
        if rank is None or size is None:
            continue
        # srun tells of the places on a host also where the library's own protocol has told of the ranks.
        local_rank = next((n for every in LAUNCHERS if (n := _number(every.local_rank)) is not None), 0)
        local_size = _number(names.local_size)
        if local_size is None and names.launcher in ("pmi", "srun"):
            local_size = _slurm_local_size()
        return Launched(names.launcher, rank, size, local_rank, local_size, names.rank)
    return Launched()


def launcher_rank() -> int:
    """This process's rank as a launcher's environment has it, where it tells no size, too; 0 without a launcher."""
    names = [*(every.rank for every in LAUNCHERS), "PMIX_RANK"]
    return next((rank for name in names if (rank := _number(name)) is not None), 0)


def parents() -> Iterator[tuple[int, str]]:
    """Id and name of the process that has started this one, of the one that has started that, and so on.

    None where there is no /proc, or from a process of another user on.
    """
    process = os.getppid()
    with contextlib.suppress(OSError, ValueError):
        while process > 0:
            name, _, after = Path(f"/proc/{process}/stat").read_text().partition("(")[2].rpartition(")")
            yield process, name
            process = int(after.split()[1])


def launcher_process() -> int | None:
    """The launcher's process on this host, by its id, which is the same for the ranks of a job; None if not seen."""
    return next((process for process, name in parents() if name.startswith(PROCESSES)), None)


def in_a_job() -> bool:
    """Whether this process is itself a rank of an MPI job.

    A shell that Slurm opens in an allocation is a task of srun too, but alone, and may start jobs.
    """
    told = launched()
    return told.launcher in ("pmi", "prrte") or told.size > 1


def in_an_allocation() -> bool:
    """Whether a batch system has given this process hosts, to which mpirun will connect."""
    return any(os.environ.get(name) for name in ("SLURM_JOB_ID", "PBS_NODEFILE", "LSB_JOBID", "PE_HOSTFILE"))


def listed(ranks: Iterable[int]) -> str:
    """For people: 0, 1, 2, ..."""
    ordered = sorted(ranks)
    return ", ".join(map(str, ordered[:8])) + ", ..." * (len(ordered) > 8)


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else None


def _slurm_local_size() -> int | None:
    """The tasks on this node, from `2(x3),1`: two on each of three nodes, one on the fourth."""
    counts: list[int] = []
    for count, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(nodes or 1)
    node = _number("SLURM_NODEID")
    return counts[node] if node is not None and node < len(counts) else None
