"""--init: a new run that starts from weights that are there, with an optimizer that has seen nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from distconv.errors import MismatchError
from distconv.nn.networks import build_network
from distconv.nn.optimizers import EMA
from distconv.run.loading import check_data, newest_of, open_file, tell_passed_over
from distconv.run.run import Run


def load_initial_weights(run: Run, say: Callable[[str], None]) -> None:
    """Have all ranks start from the weights that the setting `init` names, as rank 0 reads them; collective.

    The run is at its start. What is not trained, and not in the file, keeps its first values; the average of the
    weights, if one is kept, starts from the same. Raises MismatchError, MissingInputError, BadDataError, StorageError.
    """
    if not run.config.init:
        return
    world, parameters, shape = run.world, run.parameters, run.data.image_shape
    with world.together():
        if world.rank == 0:
            # The run's own model has layers fused, and so no longer those that a file was made of.
            model, _ = build_network(run.config.model, shape, run.data.classes, None)
            file = open_file(newest_of(Path(run.config.init), say), run.config.model)
            tell_passed_over(run.config.init, file.check(model, parameters, shape), say)
            try:
                file.fill(parameters, model, shape)
            except MismatchError:
                if file.checkpoint:  # the data may be to blame, not the model
                    check_data(file.checkpoint, run.data, "this run's data", True, file.checkpoint)
                raise
            say(f"starting from the weights of {file.path}" + ", their average" * (file.slot == EMA))
    world.comm.Bcast(parameters.vector)
    if run.config.ema:
        run.replica.state[EMA][...] = parameters.vector
    run.replica.push()
