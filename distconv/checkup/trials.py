"""Checks that run something: does the exchange give the right bits, does mpirun start ranks?"""

from __future__ import annotations

import contextlib
import hashlib
import statistics
import time
from collections.abc import Sequence

import numpy as np

from distconv.checkup.checks import Finding, ok
from distconv.comm.choose import choose
from distconv.comm.exchange import HEADER
from distconv.comm.world import World
from distconv.errors import DistconvError
from distconv.kernels import compiled
from distconv.run.build import one_of_a_host_first
from distconv.supervise.launcher import job_starter, run_job

SIZE = 123_552  # numbers; the gradient of DeepConvNet
ROUNDS = 20
MOST_ERROR = 1e-3  # of the sum's norm; float16 leaves 3e-4

TWO_RANKS = "from distconv.comm.start import start\nwith start() as world: world.rank or print(world.size)"


def exchange(world: World) -> Finding:
    """Sum random vectors as a training step does; collective, the finding is rank 0's."""
    if world.size == 1:
        return ok("exchange", "one rank alone has none: start this by mpirun or srun to try it")
    vector = random_vector(world.rank)
    seconds = {}
    unkept = world.comm.bcast(compiled.CACHE.problem())
    for wire in ("float32", "float16"):
        carrier = choose(world, SIZE, wire)
        with contextlib.nullcontext() if unkept else one_of_a_host_first(world):  # unkept: each for itself, at once
            carrier.wire.warm_up()
        times = []
        for _ in range(ROUNDS):
            total = vector.copy()
            world.comm.Barrier()
            began = time.perf_counter()
            carrier.sum(total, np.zeros((), HEADER))
            times.append(time.perf_counter() - began)
        seconds[wire] = statistics.median(times)
        carrier.close()
    digests = world.comm.gather(hashlib.sha256(total.tobytes()).hexdigest())
    if world.rank > 0:
        return ok("exchange", "")
    odd = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    right = np.zeros(SIZE)
    for rank in range(world.size):
        right += random_vector(rank)
    error = float(np.linalg.norm(total - right) / np.linalg.norm(right))
    if odd or not error < MOST_ERROR:
        found = f"ranks {', '.join(odd[:8])} hold other sums than rank 0" if odd else f"the sum is wrong by {error:.0e}"
        return Finding("exchange", "fault", found, "memory, network card or MPI library is broken there: do not train")
    found = (
        f"{carrier.how}: right on all ranks, error {error:.0e}; {SIZE:,} numbers took "
        f"{1e3 * seconds['float16']:.2f} ms in float16, {1e3 * seconds['float32']:.2f} ms in float32"
    )
    return ok("exchange", found)


def random_vector(rank: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(rank).standard_normal(SIZE, np.float32)


def mpirun(seconds: float) -> Finding:
    """Whether the mpirun at hand starts two ranks that see each other."""
    try:
        starter: Sequence[str] = job_starter(None)
        size = run_job(starter, 2, ["-c", TWO_RANKS], seconds).strip()
    except DistconvError as error:
        return Finding("mpirun", "fault", str(error), "try mpirun -n 2 hostname, and use the mpirun of the MPI library")
    if size != "2":
        found = f"{starter[0]} started 2 processes, and they see {size} ranks"
        return Finding("mpirun", "fault", found, "use the mpirun that belongs to the MPI library")
    return ok("mpirun", f"{starter[0]} starts ranks on this host")
