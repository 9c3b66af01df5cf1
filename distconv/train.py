"""`mpirun -n 4 python -m distconv.train`: train a network across MPI ranks. Flags -> run/training.py."""

from __future__ import annotations

from collections.abc import Sequence

from distconv.comm.start import run_command, start
from distconv.process.launched import launcher_rank
from distconv.run.describe import text_to_print
from distconv.run.stopping import StopRequest
from distconv.settings import read_settings


def main(argv: Sequence[str]) -> int:
    settings, print_only = read_settings(argv)
    if print_only:
        if launcher_rank() == 0:
            print(text_to_print(settings, print_only), end="")
        return 0
    stop = StopRequest()
    with start() as world:
        world.watch.set_limits(settings.hang_seconds)
        # NumPy and the compiler, once it is known how many threads they take.
        from distconv.run.ensemble import train_ensemble
        from distconv.run.training import train

        if settings.tensorboard:
            from distconv.run.tensorboard import require

            world.on_rank_0(require)  # who writes
        code = (train_ensemble if settings.ensemble > 1 else train)(settings, world, stop)
        stop.over()
    return code


if __name__ == "__main__":
    run_command(main)
