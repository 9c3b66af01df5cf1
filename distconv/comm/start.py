"""From a command line to the ranks of a job, and what can go wrong before there are any.

Until MPI has started, a rank can tell the others nothing, and a launcher may not see that it has ended. So a rank that
fails early brings its failure to the others, once MPI is up; where MPI cannot be had, it speaks and ends by a signal,
which every launcher sees.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from distconv.comm.leave import leave, prepare_to_leave
from distconv.comm.world import BLAS_THREADS, World, init_mpi, load_mpi
from distconv.errors import DistconvError, UsageError, sentence_of
from distconv.formatting import plural
from distconv.process.launched import GRACE, Launched, launched, launcher_process
from distconv.process.leftovers import SHARED_MEMORY, forget_names, sweep
from distconv.process.malloc import keep_freed_memory
from distconv.process.roll_call import LIMIT, roll_call
from distconv.process.streams import prepare_streams
from distconv.process.time_slices import cores_are_oversubscribed, take_long_time_slices
from distconv.process.voice import claim, speak, write

# Bytes of /dev/shm that MPICH 5.0.2 needs for so many ranks of a host, and for few. With less it ends in a segmentation
# fault or a bus error, or goes on, by chance: measured with 1, 2, 4, 8 and 16 ranks.
SHARED_BYTES, SHARED_BYTES_OF_A_RANK, LEAST_SHARED_BYTES = 8 << 20, 6 << 20, 20 << 20
# What a process may use at least, by the limit's name in the shell. With less, libraries end in ways of their own.
LEAST_LIMITS = (
    (resource.RLIMIT_NOFILE, "ulimit -n", 64, "open files"),
    (resource.RLIMIT_AS, "ulimit -v", 1 << 30, "bytes of memory"),
    (resource.RLIMIT_FSIZE, "ulimit -f", 64 << 20, "bytes of a file"),  # 16 MiB do for 8 ranks of MPICH
)
# For a user without an entry in /etc/passwd, as containers have them, where HOME is not set either: no folder can be
# made in it, so each use of it says what to set instead.
NO_HOME = "/dev/null"
UNMAPPED_USERS = ["0", "0", str(2**32 - 1)]  # what /proc/self/uid_map says outside of user namespaces


def run_command(command: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command and exit with its code; a DistconvError becomes one sentence, said once for all ranks."""
    prepare_streams()
    prepare_to_leave()
    # Of a run that diverges, a sentence tells; of what a user's own module computes, NumPy's warnings stay.
    beyond = "(overflow|underflow|invalid value|divide by zero) encountered"
    warnings.filterwarnings("ignore", beyond, RuntimeWarning, r"(distconv|numpy)\.")
    if not os.path.isabs(os.path.expanduser("~")):  # noqa: PTH111, PTH117 (pathlib raises where there is no home)
        os.environ["HOME"] = NO_HOME
    os.environ.pop("MPLBACKEND", None)  # pictures go into files, and a name that Matplotlib lacks would be an error
    code = _run(command, sys.argv[1:])
    try:
        sys.stdout.flush()  # Python does so when it ends, when it is too late for a sentence
    except BrokenPipeError:
        code = code or 1
    except DistconvError as error:
        write(str(error))
        code = code or error.exit_code
    leave(code)


def _run(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    try:
        return command(argv)
    except DistconvError as error:
        if not error.everywhere and not launched().alone:
            error = tell_the_others(error)
        if launched().rank == 0:
            write(str(error))
        return error.exit_code
    except BrokenPipeError:  # its reader has left, as in `... | head`
        return 1
    except KeyboardInterrupt:
        return 130
    except (Exception, SystemExit) as error:  # never from within a world, which ends the job itself
        if isinstance(error, SystemExit) and error.code in (0, None):  # after --help, say
            return 0
        if launched().alone:
            raise
        traceback.print_exc()
        return tell_the_others(DistconvError(sentence_of(error))).exit_code


def start(failure: DistconvError | None = None, limit: float = LIMIT, absent: Callable[[], str] | None = None) -> World:
    """Start MPI, one BLAS thread a rank, and return the ranks of this job.

    failure: what this rank met before; all ranks raise it. limit, absent: see roll_call. Raises DistconvError where the
    launcher belongs to another library, and in a process alone where MPI cannot be had; a rank among others that cannot
    have it ends by a signal.
    """
    told, failure = launched(), failure or compiler_cannot_run()
    one_blas_thread()
    if reading_is_refused() or in_a_user_namespace():
        switch_off_cma()
    try:
        check_limits()
        MPI = load_mpi()
        if not MPI.Is_initialized():
            check_protocol(MPI, told)
            check_shared_memory(MPI, told)
            with roll_call(told, end_alone, limit, absent):
                init_mpi()
    except DistconvError as error:
        if error.everywhere or told.alone:
            raise
        end_alone(str(error))
    vendor, version = MPI.get_vendor()
    signal.alarm(round(limit))  # nobody watches yet whether a rank hangs
    world = World(MPI.COMM_WORLD.Dup(), f"{vendor} {'.'.join(map(str, version))}")
    with contextlib.ExitStack() as failing:
        failing.push(world)  # what is raised from here on ends the job
        forget_names()  # World is collective: no rank is still within MPI_Init
        check_size(world, told, vendor)
        share_failure(world, failure)
        keep_freed_memory()
        if cores_are_oversubscribed(world.local):
            take_long_time_slices()
        signal.alarm(0)
        failing.pop_all()
    return world


def one_blas_thread() -> None:
    """Have this process multiply matrices in one thread, unless the user has said how many.

    Numba's kernels, which do most of the work, have one anyway. Threads of BLAS wait for one another where a core is
    busy with something else, or beyond a container's share of it, and BLAS looks at neither: a step takes many times
    as long then.
    """
    if any(os.environ.get(name) for name in BLAS_THREADS):
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # for NumPy when it is loaded, which then starts no threads at all
    if "numpy" in sys.modules:
        with contextlib.suppress(Exception):  # a broken NumPy is told where it is used
            import threadpoolctl

            threadpoolctl.threadpool_limits(1)


def compiler_cannot_run() -> UsageError | None:
    """What to say where Numba is told not to compile, as people do who look for a mistake, or cannot start."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return UsageError(
            "NUMBA_DISABLE_JIT is set, but distconv's kernels cannot run without being compiled: unset it"
        )
    threads = os.environ.get("NUMBA_NUM_THREADS", "1")
    if not threads.isdecimal() or int(threads) < 1:
        return UsageError(
            f"NUMBA_NUM_THREADS={threads}: Numba takes a whole number from 1 on; unset it, as the kernels need no more"
        )
    return None


def check_limits() -> None:
    """Raise DistconvError where the system lets this process have too little; a limit of its own choice is raised."""
    for limit, command, least, what in LEAST_LIMITS:
        soft, hard = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and soft < least:
            if hard != resource.RLIM_INFINITY and hard < least:
                raise DistconvError(f"only {hard:,} {what} are allowed here ({command}): allow {least:,} or more")
            resource.setrlimit(limit, (least, hard))


def check_shared_memory(MPI: Any, told: Launched) -> None:
    """Sweep /dev/shm, and raise DistconvError where MPICH would crash for want of room in it.

    The first rank of a host to come measures, as those that have started MPI have taken their part. Until it knows, and
    where there is too little until it has ended the job, the others wait for its lock.
    """
    if not SHARED_MEMORY.is_dir():
        return
    if MPI.get_vendor()[0] == "Open MPI":  # which looks itself whether there is room, and goes on without
        if claim("swept"):
            sweep()
        return
    shared = os.open(SHARED_MEMORY, os.O_RDONLY)
    for look in range(300):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if look > 50:
                time.sleep(GRACE / 2)  # the rank that had it so long has refused, and its end is that of the job
            break
        time.sleep(0.01)
    if claim("measured"):
        sweep()
        ranks, store = told.local_size or 1, os.fstatvfs(shared)
        room, needed = store.f_bavail * store.f_frsize, SHARED_BYTES + ranks * SHARED_BYTES_OF_A_RANK
        if room < max(needed, LEAST_SHARED_BYTES):
            raise DistconvError(
                f"/dev/shm has {room >> 20} MiB left, and MPI may need {max(needed, LEAST_SHARED_BYTES) >> 20} for "
                f"{plural(ranks, 'rank')}: give a container more (docker run --shm-size 256m), or remove "
                "what dead jobs have left there"
            )
    os.close(shared)


def reading_is_refused() -> bool:
    """Whether this system refuses process_vm_readv(2), as docker does by default; tried on this process itself."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "process_vm_readv"):
        return False
    ours, copy = (ctypes.create_string_buffer(8) for _ in range(2))
    there, here = ((ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8) for buffer in (ours, copy))  # struct iovec
    read = libc.process_vm_readv(os.getpid(), here, 1, there, 1, 0)
    return bool(read < 0 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS))


def in_a_user_namespace() -> bool:
    """Whether ranks may be in user namespaces of their own, as in Apptainer's containers, and refuse one another."""
    with contextlib.suppress(OSError):
        return Path("/proc/self/uid_map").read_text().split() != UNMAPPED_USERS
    return False


def switch_off_cma() -> None:
    """Have MPI copy through shared memory: it would else abort at the first large message between ranks of a host."""
    os.environ.setdefault("MPIR_CVAR_CH4_CMA_ENABLE", "0")  # MPICH
    os.environ.setdefault("OMPI_MCA_smsc", "^cma")  # Open MPI 5
    os.environ.setdefault("OMPI_MCA_btl_vader_single_copy_mechanism", "none")  # Open MPI 4


def check_protocol(MPI: Any, told: Launched) -> None:
    """Raise DistconvError where the launcher and the MPI library are known not to understand each other.

    MPI_Init would end the process, or start it alone.
    """
    if told.alone:
        return
    pmix, pmi = "PMIX_NAMESPACE" in os.environ, "PMI_RANK" in os.environ
    vendor = MPI.get_vendor()[0]
    if vendor == "MPICH" and pmix and not pmi and "pmix" not in MPI.Get_library_version().lower():
        speaks, knows = "PMIx", "PMI"
    elif vendor == "Open MPI" and by_srun() and pmi and not pmix:
        speaks, knows = "PMI", "PMIx"
    else:
        return
    raise _refusal(f"the launcher speaks {speaks}, and this {vendor} only {knows}: {_how_to_start(vendor)}")


def by_srun() -> bool:
    """Whether srun has started this rank itself, rather than the daemons of an mpirun."""
    started = {"MPI_LOCALNRANKS", "OMPI_COMM_WORLD_SIZE"} & os.environ.keys()
    return "SLURM_STEP_NUM_TASKS" in os.environ and not started


def check_size(world: World, told: Launched, vendor: str) -> None:
    """Raise DistconvError, or end, where MPI sees fewer ranks than the launcher has started."""
    if world.size == told.size or told.alone:
        return
    sees = "each of them alone" if world.size == 1 else f"{world.size}"
    refusal = _refusal(
        f"the launcher started {told.size} processes, but {world.library} sees {sees}: {_how_to_start(vendor)}"
    )
    if refusal.everywhere:
        raise refusal
    end_alone(str(refusal))


def _how_to_start(vendor: str) -> str:
    if by_srun():
        flag = "--mpi=pmix" if vendor == "Open MPI" else "--mpi=pmi2"
        return f"start it by srun {flag}, or in a batch script by the mpirun of {vendor} without srun"
    return f"use the mpirun of {vendor} that belongs to this Python environment"


def _refusal(sentence: str) -> DistconvError:
    """srun does the same to all ranks; under an mpirun, one may be in another environment than the others."""
    failure = DistconvError(sentence)
    failure.everywhere = by_srun()
    return failure


def share_failure(world: World, failure: DistconvError | None) -> None:
    """Raise on all ranks what one of them has met before MPI started; collective."""
    met = world.comm.allgather((failure, socket.gethostname()))
    rank = next((r for r, (of_one, _) in enumerate(met) if of_one is not None), None)
    if rank is None:
        return
    first, host = met[rank]
    if any(str(of_one) != str(first) for of_one, _ in met):
        first.args = (f"rank {rank} of {world.size} on {host}: {first}",)
    raise first.on_all_ranks()


def tell_the_others(failure: DistconvError) -> DistconvError:
    """Bring what this rank met before MPI started to all ranks; returns what they raise."""
    try:
        start(failure)
    except DistconvError as shared:
        return shared
    raise AssertionError("start raises what it is given")


def end_alone(sentence: str) -> NoReturn:
    """Say why this rank cannot go on, and end it by a signal, where a launcher can see it; in any thread."""
    told = launched()
    who = "" if told.alone else f"rank {told.rank} of {told.size} on {socket.gethostname()}: "
    speak(f"{who}{sentence}")
    if launcher_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(1)
