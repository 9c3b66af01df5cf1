"""A training run on one rank: what it is made of, where it stands, and the engine that computes its steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distconv.comm.exchange import Headers
from distconv.comm.probe import WireProbe
from distconv.comm.world import World
from distconv.config import Config
from distconv.data.dataset import Bytes, Dataset
from distconv.data.shard import batches
from distconv.kernels.interface import Array
from distconv.nn.layers import Layer
from distconv.nn.optimizers import Optimizer
from distconv.nn.parameters import Parameters, digest

Samples = NDArray[np.int64]


class Engine(Protocol):
    """Computes the steps of a run."""

    device: str  # cpu or cuda
    evaluation_batch: int  # images at a time

    def gradient(
        self, run: Run, samples: Samples, global_batch: int, step: int, probing: bool = False,
        following: Samples | None = None
    ) -> float:  # fmt: skip
        """Compute this rank's share of the gradient of the mean loss over the global batch; return its sum of losses.

        samples (N,) are its part of the batch, and may be none. probing: contribution will be asked for. following: the
        samples of the next step, which has the same global batch and does not probe, if it may begin at once.
        """
        ...

    def contribution(self, run: Run) -> Array:
        """The probe's sample of this rank's share, before it is summed."""
        ...

    def sum(self, run: Run, header: Headers) -> Headers:
        """Sum the gradient over the ranks; see Exchange."""
        ...

    def total(self, run: Run) -> Array:
        """The sum, until the update; before it is summed, this rank's share, if probing."""
        ...

    def update(self, run: Run, t: int) -> bool:
        """Make step t, counted from 1, if the gradient is finite; whether it was."""
        ...

    def checksum(self, run: Run) -> int:
        """A sum over the bits of parameters and optimizer's state: another if one changes; 0 where none is kept."""
        ...

    def classify(self, model: Layer, parameters: Parameters, images: Bytes) -> NDArray[np.int64]:
        """The class that the model gives each image (N, H, W, C), without dropout -> (N,)."""
        ...

    def pull(self, run: Run) -> None:
        """Bring the run's parameters and the optimizer's state up to date."""
        ...

    def push(self, run: Run) -> None:
        """Take them over, where somebody has changed them."""
        ...


@dataclass
class Run:
    """A training run on one rank: what it is made of, and the position that a checkpoint holds."""

    config: Config
    dataset: Dataset
    model: Layer
    parameters: Parameters
    optimizer: Optimizer
    world: World
    exchange: Any  # an Exchange, or the GpuExchange of a GPU's engine
    probe: WireProbe
    engine: Engine
    step: int = 0  # steps done since the first epoch began
    loss_sum: float = 0.0  # over the samples of this epoch so far, skipped steps left out
    samples: int = 0  # in loss_sum
    skipped: int = 0  # steps in a row whose gradient was not finite
    first_loss: float = 0.0  # of the run's first step; 0 before it
    diverging: int = 0  # updates in a row after a loss that was not finite or far above the first
    good_until: int = 0  # the step whose state last gave a loss that was neither
    checksum: int = 0  # after the last update; see Engine
    corrupted: bool = False  # whether bits of the state have changed between two updates, when nothing may write them
    agreed_sha256: str = ""  # SHA-256 of the last state that all ranks were seen to share
    exchanged: float = field(default_factory=time.perf_counter)  # when the last exchange ended

    @property
    def steps_per_epoch(self) -> int:
        return batches(len(self.dataset.train_labels), self.config.batch_size)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def position(self) -> dict[str, Any]:
        epoch, batch = divmod(self.step, self.steps_per_epoch)
        cursor = batch * self.config.batch_size
        moving = {name: getattr(self, name) for name in ("step", "loss_sum", "samples", "skipped", "first_loss")}
        return {**moving, "epoch": epoch, "cursor": cursor}

    def vectors(self) -> dict[str, Array]:
        """The state, which checkpoints hold and all ranks share: parameters and optimizer's vectors, by slot."""
        return {"value": self.parameters.vector, **self.optimizer.state}

    def digest(self) -> str:
        """SHA-256 over the bits of the state: equal replicas have it in common."""
        return digest(self.parameters.by_slot(self.vectors()))

    def restore(self, position: dict[str, Any], vectors: dict[str, Any]) -> None:
        """Go to the position of a checkpoint."""
        self.step, self.loss_sum = position["step"], position["loss_sum"]
        self.samples, self.skipped = position["samples"], position["skipped"]
        self.first_loss = position.get("first_loss", 0.0)  # older checkpoints have none
        self.parameters.vector[...] = vectors["value"]
        for slot, vector in self.optimizer.state.items():
            vector[...] = vectors[slot]
        self.engine.push(self)
