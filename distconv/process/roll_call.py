"""Who of this host's ranks is there while MPI starts.

A rank waits in MPI_Init until all ranks have come. MPICH's launcher and srun do not tell it that one of them has ended
before, with an exit code and without a word: the others would wait for ever. So each rank looks around while it waits.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from distconv.process.launched import Launched, launcher_process, listed
from distconv.process.voice import write

LOOK = 0.5  # seconds between looks
MISSED = 4  # looks in a row without a rank; a launcher starts all of a host within this time
SAY = 10.0  # seconds after which a user is told who is waited for
LIMIT = 300.0  # seconds after which nobody waits any more; a large job on a slow file system may need minutes


@contextlib.contextmanager
def roll_call(
    told: Launched, end: Callable[[str], object], limit: float = LIMIT, absent: Callable[[], str] | None = None
) -> Iterator[None]:
    """Run a part that starts MPI; call end, in another thread, with the reason why this can never succeed.

    limit: seconds after which it counts as such; absent: tells then who has not come.
    """
    over = threading.Event()
    if not told.alone:
        threading.Thread(target=_watch, args=(told, end, limit, absent, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(
    told: Launched,
    end: Callable[[str], object],
    limit: float,
    absent: Callable[[], str] | None,
    over: threading.Event,
) -> None:
    began, missed, seen, said = time.monotonic(), 0, set[int](), False
    while not over.wait(LOOK):
        waited, here = time.monotonic() - began, ranks_here(told)
        missed = missed + 1 if here and (seen - here.keys() or len(here) < (told.local_size or 0)) else 0
        seen |= here.keys()
        who = f"ranks {listed(here.keys() or {told.rank})} of {told.size} are here on {socket.gethostname()}"
        if missed == MISSED:
            expected = set(range(told.size)) if told.local_size == told.size else seen
            lost = expected - here.keys()
            named = f"rank {listed(lost)} of {told.size}" if lost else "a rank of this host"
            end(f"{named} ended before MPI had started, and so ends the job")
        elif waited > limit:
            missing = absent() if absent else f"{who}, others have not come"
            end(f"MPI has not started within {limit:.0f} s: {missing}{stopped(here)}{_name_problem()}")
        elif waited > SAY and not said and told.rank == min(here, default=told.rank):
            said = True
            write(f"waiting for MPI to start; {who}{stopped(here)}{_name_problem()}")


def ranks_here(told: Launched) -> dict[int, bool]:
    """The ranks of this job whose processes are alive on this host, and whether they are stopped (kill -STOP).

    None of them where that cannot be seen.
    """
    if (launcher := launcher_process()) is None:
        return {}
    found: dict[int, bool] = {}
    try:
        import psutil  # seldom needed
    except ImportError:
        return {}
    try:
        for process in psutil.Process(launcher).children(recursive=True):
            with contextlib.suppress(ValueError, psutil.Error):
                rank = int(process.environ().get(told.rank_name, ""))
                found[rank] = found.get(rank, False) or process.status() == psutil.STATUS_STOPPED
    except (OSError, psutil.Error):
        return {}
    return found


def stopped(here: Mapping[int, bool]) -> str:
    """A part of a sentence, where a rank is stopped."""
    ranks = {rank for rank, is_stopped in here.items() if is_stopped}
    return f"; rank {listed(ranks)} is stopped (kill -CONT lets it go on)" if ranks else ""


def own_name_resolves() -> bool:
    """Whether this host finds an address for its own name, which launchers give to the other hosts."""
    try:
        return bool(socket.getaddrinfo(socket.gethostname(), None))
    except OSError:
        return False


def _name_problem() -> str:
    if own_name_resolves():
        return ""
    return f"; this host's own name {socket.gethostname()} has no address: put it into /etc/hosts"
