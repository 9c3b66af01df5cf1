"""The ranks of a job: they agree, and end together. The only file that imports mpi4py.

With plain MPI a rank that raises leaves the others waiting in a collective for ever. So everything after MPI's start
happens inside `with start() as world:` (start.py), which ends all ranks when one of them fails, and errors that every
rank meets alike are gathered by `together` and reported once; `on_rank_0` does so for what one rank does for all.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import sys
import textwrap
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from distconv.errors import HUNG, DistconvError, MismatchError, sentence_of
from distconv.monitor.heartbeat import Heartbeat
from distconv.monitor.judge import Judge
from distconv.monitor.watch import Watch
from distconv.monitor.whereabouts import Whereabouts
from distconv.process.launched import GRACE, launched, listed
from distconv.process.malloc import zeroed_memory
from distconv.process.voice import claim, write

SHORTEST_PAUSE, LONGEST_PAUSE = 50e-6, 0.005  # seconds, between two looks whether the others have come
BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")
Found = TypeVar("Found")


class World:
    """The ranks of a job. A context manager: what is raised inside ends the job on all ranks.

    rank, size: in the job; local_rank, local_size: among the ranks of this host, whose communicator is local; hosts:
    how many there are. error_folder: where a failing rank leaves its report, once there is such a folder.
    """

    def __init__(self, comm: Any, library: str) -> None:
        self.comm = comm
        self.process = os.getpid()
        self.library = library
        self.rank: int = comm.rank
        self.size: int = comm.size
        self.local = comm.Split_type(load_mpi().COMM_TYPE_SHARED)
        self.local_rank: int = self.local.rank
        self.local_size: int = self.local.size
        self.hosts = sum(comm.allgather(self.local_rank == 0))
        self.error_folder: Path | None = None
        self.whereabouts = Whereabouts(self.local, self.rank)
        self.at = self.whereabouts.at
        judge = Judge(self.rank, comm.allgather(socket.gethostname()))
        self.heartbeat = self._between_hosts()
        processes = self._neighbours()
        self.watch = Watch(self.whereabouts, self.heartbeat, judge, processes, self._lost, self._hung, end_job)

    def gathered(self, value: Any) -> list[Any]:
        """What each rank gives. A rank sleeps until the last has come; MPI's own collectives would hold its core."""
        self.wait()
        found: list[Any] = self.comm.allgather(value)
        return found

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a part; a DistconvError of any rank in it is raised on all of them, once. Who is done first sleeps.

        The part may hold a collective where all ranks come to it, or none does.
        """
        error = None
        try:
            yield
        except DistconvError as caught:
            error = caught
        for rank, failure in enumerate(self.gathered(error)):
            if failure is not None:
                if self.size > 1 and rank > 0:
                    failure.args = (f"rank {rank}: {failure}",)
                raise failure.on_all_ranks()

    def on_rank_0(self, find: Callable[[], Found]) -> Found:
        """Call find() on rank 0 alone. All ranks return what it gives, or raise its DistconvError."""
        found = None
        with self.together():
            if self.rank == 0:
                found = find()
        return self.comm.bcast(found)  # type: ignore[no-any-return]

    def agree(self, what: str, value: str, advice: str) -> None:
        """Raise MismatchError on all ranks if value is not the same on each: what differs, where, and the advice."""
        values = self.gathered(value)
        if len(set(values)) > 1:
            raise MismatchError(f"ranks disagree about {what}: {odd_ones(values)} ({advice})").on_all_ranks()

    def wait(self, on_host: bool = False) -> None:
        """A barrier for all ranks, or those of this host, that leaves the cores to those that still work."""
        request = (self.local if on_host else self.comm).Ibarrier()
        pause = SHORTEST_PAUSE
        while not request.Test():
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self.process:
            self._leave_as_a_child(error)
        if error is None or (isinstance(error, DistconvError) and error.everywhere):
            if error is not None and self.rank == 0:
                self._leave_report(error, error.exit_code)
            self.wait()  # srun -K ends the others once the first has left with an exit code, and one may still write
            self.whereabouts.own.leaving = 1  # who still watches does not miss it
            self.watch.stop()
            if self.heartbeat:
                self.heartbeat.close()
            return  # run_command speaks and exits, on all ranks alike
        code = self._exit_code(error)
        with contextlib.suppress(Exception):  # a full disk, a closed pipe: the others must not wait for words
            self._report(error, code)
            sys.stdout.flush()
            sys.stderr.flush()
        if self.size > 1:
            end_job(code)
        raise SystemExit(code)

    def _between_hosts(self) -> Heartbeat | None:
        """Signs of life between ranks that share no memory, by one of each such group; None on the others."""
        MPI, table = load_mpi(), self.whereabouts
        first = table.comm.rank == 0
        of_each = self.comm.Split(0 if first else 1, self.rank)
        if not first or of_each.size == 1 or MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            return None
        return Heartbeat(of_each, len(table.memory))

    def _neighbours(self) -> dict[int, int]:
        """Process ids by rank: of the other ranks of this host, as far as they count processes as this one does."""
        numbering = str(Path("/proc/self/ns/pid").readlink()) if sys.platform == "linux" else ""
        found: list[tuple[str, int, int]] = self.local.allgather((numbering, self.rank, os.getpid()))
        return {rank: process for other, rank, process in found if other == numbering and rank != self.rank}

    def _lost(self, ended: list[int], alive: list[int]) -> None:
        """Say why the job ends where ranks are gone; in a thread of its own."""
        if self.rank > min(alive, default=self.size):
            time.sleep(GRACE / 4)
            return  # that one speaks
        # Else they have spoken themselves. Path.exists would raise, and end this thread, where the disk is gone.
        if not os.path.exists(self.error_folder or ""):  # noqa: PTH110
            who = f"rank{'s' * (len(ended) > 1)} {listed(ended)} of {self.size}"
            write(f"{who} ended without a word, and so ends the job")

    def _hung(self, sentence: str) -> None:
        """Take down the stacks of all ranks of this host, and say the sentence if it is not empty; in a thread."""
        stacks = self.whereabouts.stacks()
        if self.error_folder is not None:
            with contextlib.suppress(OSError):
                self.error_folder.mkdir(exist_ok=True)
                for entry in self.whereabouts.entries:
                    where, stack = f"in {entry.where()}", stacks.get(entry.rank, "no stack could be had")
                    self._write_report(entry.rank, where, HUNG, stack, cause=sentence)
        if sentence:
            where = f"; what each rank was doing is in {self.error_folder}" if self.error_folder else ""
            write(f"{sentence}; so the job ends{where}")

    def _leave_as_a_child(self, error: BaseException | None) -> NoReturn:
        """A child that a user's code has forked is no rank, and its end is not that of the job."""
        if error is None or (isinstance(error, SystemExit) and not error.code):
            os._exit(0)
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        os._exit(self._exit_code(error))

    @staticmethod
    def _exit_code(error: BaseException) -> int:
        if isinstance(error, DistconvError):
            return error.exit_code
        if isinstance(error, KeyboardInterrupt):
            return 130
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            return error.code or 1  # a rank that leaves alone has failed, whatever it says
        return 1

    def _report(self, error: BaseException, code: int) -> None:
        """Leave a report and, if no other rank has done so before, say what happened; else wait to be ended by it."""
        first = claim("failed") if self.error_folder is None else self._leave_report(error, code)
        if first:
            if isinstance(error, DistconvError):
                text, sentence = "", str(error)
            else:
                text, sentence = "".join(traceback.format_exception(error)), sentence_of(error)
            job = f"distconv: rank {self.rank} of {self.size} failed and ends the job: {sentence}\n"
            sys.stderr.write(text + job)
            sys.stderr.flush()
            if self.error_folder is None:
                time.sleep(GRACE / 4)  # its claim ends with this rank, and others may be about to fail alike
        else:
            time.sleep(GRACE)  # the one that speaks may not have spoken yet, and to end the job would end it

    def _leave_report(self, error: BaseException, code: int) -> bool:
        """Write errors/rank-R.json, if there is a folder for it; whether no other rank has done so before."""
        first = True
        with contextlib.suppress(OSError):
            if self.error_folder is not None:
                try:
                    self.error_folder.mkdir()  # whoever makes the folder is the first to fail
                except FileExistsError:
                    first = False
                self._write_report(self.rank, sentence_of(error), code, "".join(traceback.format_exception(error)))
        return first

    def _write_report(self, rank: int, error: str, code: int, text: str, cause: str = "") -> None:
        """cause: why the job has ended, where that is not this rank's error."""
        report = {"rank": rank, "host": socket.gethostname(), "error": error, "exit_code": code, "traceback": text}
        report |= {"cause": cause} if cause else {}
        assert self.error_folder is not None
        (self.error_folder / f"rank-{rank}.json").write_text(json.dumps(report, indent=1) + "\n")


def odd_ones(values: Sequence[object]) -> str:
    """Which ranks differ from the majority, or from rank 0 where there is none. values: of all ranks, not all alike."""
    commonest, count = Counter(values).most_common(1)[0]
    right = commonest if 2 * count > len(values) else values[0]
    odd = [rank for rank, value in enumerate(values) if value != right]
    return f"{who_differ(odd)} from {'the others' if values[0] != right else 'rank 0'}"


def who_differ(ranks: Sequence[int]) -> str:
    """rank 2 differs, ranks 0, 2 differ"""
    return f"rank {ranks[0]} differs" if len(ranks) == 1 else f"ranks {listed(ranks)} differ"


def end_job(code: int) -> NoReturn:
    """End all ranks with an exit code, from any thread, also where MPI is stuck."""
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is not None and not launched().alone and MPI.Is_initialized() and not MPI.Is_finalized():
        others_may_call = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        if others_may_call or threading.current_thread() is threading.main_thread():
            giving_up = threading.Timer(GRACE, os._exit, (code,))
            giving_up.daemon = True
            giving_up.start()
            # Of another communicator, MPICH would ask the other ranks to end, and its launcher would tell of that.
            # mpi4py's own Abort lets no other thread run.
            call = _mpi_function("MPI_Abort") or (lambda comm, code: MPI.COMM_WORLD.Abort(code))
            call(ctypes.c_void_p(MPI._handleof(MPI.COMM_WORLD)), code)
    os._exit(code)


def blas_threads() -> int:
    """Threads that a matrix product of this process uses."""
    import threadpoolctl

    return max((pool["num_threads"] for pool in threadpoolctl.threadpool_info()), default=1)


def load_mpi() -> Any:
    """mpi4py's module. MPI itself is not started by that. Raises DistconvError where there is no MPI library."""
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (Exception, SystemExit) as error:  # whatever a broken installation does
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise DistconvError(
            f"no MPI library can be loaded ({reason}): pip install mpich, or load the MPI module of your cluster"
        ) from None
    return MPI


def init_mpi() -> None:
    """MPI_Init_thread, which returns when all ranks have come. Other threads of Python run meanwhile.

    mpi4py's own Init_thread lets none run, so nobody could look for the ranks that do not come.
    """
    MPI = load_mpi()
    call = _mpi_function("MPI_Init_thread")
    if call is None:
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        return
    with zeroed_memory():
        failed = call(None, None, MPI.THREAD_MULTIPLE, ctypes.byref(ctypes.c_int()))
    if failed:
        raise DistconvError("MPI could not be started: run python -m distconv.doctor")
    for comm in (MPI.COMM_WORLD, MPI.COMM_SELF):
        comm.Set_errhandler(MPI.ERRORS_RETURN)  # as mpi4py does, which makes exceptions of them


def _mpi_libraries() -> Iterator[ctypes.CDLL]:
    """The libraries of MPI that this process has loaded."""
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_text().split()
        for path in dict.fromkeys(word for word in maps if Path(word).name.startswith("libmpi")):
            with contextlib.suppress(OSError):
                yield ctypes.CDLL(path)


def _mpi_function(name: str) -> Any:
    """A function of the MPI library itself, which lets other threads of Python run; None if it is not found."""
    return next((getattr(library, name) for library in _mpi_libraries() if hasattr(library, name)), None)


def cuda_aware_mpi() -> str | None:
    """Why this MPI library may not be given addresses of a GPU, or None where it says that it takes them.

    A library that does not take them ends in a segmentation fault, so one that does not answer counts as one.
    """
    for library in _mpi_libraries():
        with contextlib.suppress(AttributeError):
            if library.MPIX_Query_cuda_support():
                return None
            return "this MPI says that it takes no addresses of a GPU"
    return "this MPI does not say whether it takes addresses of a GPU"
