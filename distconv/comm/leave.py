"""The end of a process. It waits neither for ever for what a user's code has started, nor for ranks that never come.

Python ends its threads, then processes made by multiprocessing, and then MPI. It would wait for each without a word.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from typing import Any, NoReturn

from distconv.monitor.judge import LEAST
from distconv.process.voice import write


def prepare_to_leave() -> None:
    """To be called before anything else registers with atexit, whose functions run in the reverse order."""
    atexit.register(_await_other_ranks)


def leave(code: int) -> NoReturn:
    """Exit with a code; after LEAST / 2 seconds without what has not ended by then, as ranks in MPI_Finalize wait."""

    def leave_behind(number: int, frame: Any) -> None:
        threads = [thread for thread in threading.enumerate() if not thread.daemon]
        left = [f"thread {thread.name}" for thread in threads if thread is not threading.main_thread()]
        multiprocessing: Any = sys.modules.get("multiprocessing")
        for child in multiprocessing.active_children() if multiprocessing else ():
            left.append(f"process {child.name}")
            child.kill()  # mpirun would wait for it, too
        write(f"what your own code has started does not end, and is ended now: {', '.join(left) or 'a hook of atexit'}")
        _await_other_ranks()
        MPI = sys.modules.get("mpi4py.MPI")
        if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized():
            MPI.Finalize()
        os._exit(code)

    signal.signal(signal.SIGALRM, leave_behind)
    signal.alarm(round(LEAST / 2))
    sys.exit(code)


def _await_other_ranks() -> None:
    """MPI_Finalize waits for them, and nobody watches any more whether one hangs; no function of Python runs then."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(round(LEAST))
