"""Who writes the checkpoints of a run: rank 0, when it is asked to, and when the time has come."""

from __future__ import annotations

import time
from pathlib import Path

from distconv import errors
from distconv.run import checkpoint as files
from distconv.run.folder import BEST, LOCK, lock_file
from distconv.run.log import RunLog
from distconv.run.run import Run

COST = 100  # times as much training as saving


class Saver:
    """Writes the states that all ranks have agreed on; of ranks but 0 it does nothing."""

    def __init__(self, run: Run, folder: Path, data_name: str, log: RunLog) -> None:
        self.run, self.folder, self.log = run, folder, log
        shape = list(run.data.image_shape)
        self.data = {
            "name": data_name,
            "digest": run.data.digest,
            "classes": run.data.classes,
            "image_shape": shape,
        }
        self.lock = lock_file(folder.parent)
        self.due = time.monotonic() + run.config.checkpoint_seconds
        self.saved_at = -1  # step

    def is_due(self) -> bool:
        return self.run.world.rank == 0 and time.monotonic() >= self.due

    def save(self) -> bool:
        """Write the state that the ranks have just agreed on, and return True; or False, after a bad step."""

        run, began = self.run, time.monotonic()
        if run.skipped or run.diverging:
            return False
        if run.world.rank == 0 and self.saved_at != run.step:
            run.world.at("save")
            try:
                lock, there = lock_file(self.folder.parent), self.folder.exists()
            except OSError as error:  # a disk that is gone, say
                raise errors.StorageError(f"{self.folder.parent} cannot be read: {error}") from None
            if not there:
                raise errors.StorageError(
                    f"{self.folder} is gone: somebody has removed or renamed the folder of the run"
                )
            if lock != self.lock:
                raise errors.StorageError(
                    f"{self.folder.parent / LOCK} is not the file that this job has locked: somebody has removed it, "
                    "and another job may have the folder; see to it that none has, and start again"
                )
            path = files.save_checkpoint(
                self.folder, run.parameters, run.replica.state, run.position(), run.config, self.data, run.agreed_sha256
            )
            if run.best_epoch and run.best_epoch * run.steps_per_epoch == run.step:
                files.keep_copy(path, self.folder.parent / BEST)
            self.saved_at = run.step
            now, asked = time.monotonic(), run.config.checkpoint_seconds
            self.due = now + (max(asked, COST * (now - began)) if asked else 0)
        return True

    def set_aside(self, step: int) -> None:
        """Have no run go on from the states after this step and later ones."""

        if self.run.world.rank == 0:
            for path in files.set_aside(self.folder, step):
                self.log.say(f"set aside as {path}: the loss was out of bounds in the steps after it")
