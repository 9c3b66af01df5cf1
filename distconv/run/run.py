"""A training run on one rank: what it is made of, and where it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.comm.probe import WireProbe
from distconv.comm.world import World
from distconv.config import Config
from distconv.data.data import Data
from distconv.data.shard import Shards, batches
from distconv.kernels.interface import Array
from distconv.nn.parameters import Parameters, digest
from distconv.run.noise import MOMENTS
from distconv.run.replica import Replica
from distconv.run.scores import contexts
from distconv.tasks.task import Task

# The fields of a Run that a checkpoint holds.
POSITION = ("step", "loss_sum", "samples", "skipped", "first_loss", "best_score", "best_epoch", "noise_sums")


@dataclass
class Run:
    """What a run is made of, and the position that a checkpoint holds."""

    config: Config
    data: Data
    task: Task
    replica: Replica
    world: World
    probe: WireProbe
    shards: Shards
    step: int = 0  # steps done since the first epoch began
    loss_sum: float = 0.0  # over the samples of this epoch so far, skipped steps left out
    samples: int = 0  # in loss_sum
    # What the steps of this epoch so far tell of the gradient's noise; see scale_of.
    noise_sums: list[float] = field(default_factory=lambda: [0.0] * MOMENTS)
    skipped: int = 0  # steps in a row whose gradient was not finite
    first_loss: float = 0.0  # of the run's first step; 0 before it
    best_score: float = -math.inf  # on the validation set
    best_epoch: int = 0  # that had it, counted from 1; 0: none yet
    diverging: int = 0  # updates in a row after a loss that was not finite or far above the first
    good_until: int = 0  # the step whose state last gave a loss that was neither
    checksum: int = 0  # after the last update; see Replica
    corrupted: bool = False  # whether bits of the state have changed between two updates, when nothing may write them
    agreed_sha256: str = ""  # SHA-256 of the last state that all ranks were seen to share
    busy_sum: Any = 0.0  # see note_busy
    busy_steps: int = 0
    exchanged: float = 0.0  # when the last exchange ended

    @property
    def parameters(self) -> Parameters:
        return self.replica.parameters

    @property
    def steps_per_epoch(self) -> int:
        return batches(self.data.size("train"), self.config.step_size)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def out_of_patience(self) -> bool:
        """Whether the validation score has not become better for so long that the run is over."""
        return self.config.is_out_of_patience(self.step // self.steps_per_epoch, self.best_epoch)

    def measure(self, part: str, most: int = 0, averaged: bool = False) -> tuple[float, float]:
        """The two sums of Task.evaluate over the first `most` samples of a part (0: all), each once; collective.

        Those of the shards are added up in their order, so all ranks have the same bits. averaged: of the average of
        the weights, see Replica.
        """
        replica, size = self.replica, self.data.size(part)
        values = replica.averages if averaged else replica.values
        count, found = min(most or size, size), []
        start = self.shards.part(count).start
        for shard in self.shards.parts(count):
            sums = np.zeros(2)
            for context in contexts(slice(start + shard.start, start + shard.stop), replica.kernels, self.world):
                batch = self.data.batch(part, context.samples, context)
                two = self.task.evaluate(replica.model, values, batch, context)
                sums += [np.asarray(one).item() for one in two]  # some give arrays of one number
            found.append(sums)
        score, weight = np.concatenate(self.world.comm.allgather(found)).cumsum(axis=0)[-1]
        return float(score), float(weight)

    def note_busy(self, seconds: NDArray[np.float64]) -> None:
        """Of a step: how long each rank (P,) was busy since the end of the last exchange."""
        self.busy_sum = self.busy_sum + seconds
        self.busy_steps += 1

    def take_busy(self) -> list[float]:
        """The means of these seconds since they were last taken, or since this start of the run."""
        means: list[float] = (self.busy_sum / self.busy_steps).tolist() if self.busy_steps else []
        self.busy_sum, self.busy_steps = np.zeros(self.world.size), 0
        return means

    def position(self) -> dict[str, Any]:
        """What a checkpoint holds of it; cursor: samples of the epoch that are done."""
        epoch, batch = divmod(self.step, self.steps_per_epoch)
        cursor = batch * self.config.step_size
        return {**{name: getattr(self, name) for name in POSITION}, "epoch": epoch, "cursor": cursor}

    def vectors(self) -> dict[str, Array]:
        """The state, which checkpoints hold and all ranks share: parameters, optimizer's vectors, average, by slot."""
        return {"value": self.parameters.vector, **self.replica.state}

    def digest(self) -> str:
        """SHA-256 over the bits of the state: equal replicas have it in common."""
        return digest(self.parameters.by_slot(self.vectors()))

    def restore(self, position: dict[str, Any], vectors: dict[str, Any]) -> None:
        """Go to the position of a checkpoint."""
        for name in POSITION:
            setattr(self, name, position[name])
        for slot, vector in self.vectors().items():
            vector[...] = vectors[slot]
        self.replica.push()
