"""A replica: the model on this rank's device, and the steps that it makes there with all others.

A step is one program: the task's gradient of this rank's samples, the exchange, the optimizer. Where the device needs
no host in between, it is one piece of work, which a GPU records once and replays from then on; else it is two, and the
host exchanges between them. What changes from step to step goes to the device in a message, and what the host must know
(the task's sums, and whether all was finite) comes back in another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.comm.exchange import Headers, step_header
from distconv.comm.on_cpu import DeviceExchange
from distconv.config import Config
from distconv.data.data import Data
from distconv.data.shard import Shards, batches, split
from distconv.errors import DistconvError
from distconv.kernels.interface import FINITE, Agreed, Array, Kernels
from distconv.nn.fusion import fused
from distconv.nn.layers import Chain, Context, Layer
from distconv.nn.optimizers import EMA, Optimizer
from distconv.nn.parameters import Parameters
from distconv.run.noise import steps_of_a_look
from distconv.tasks.classify import Classification
from distconv.tasks.task import Task

Samples = NDArray[np.int64]


class Replica:
    """The vectors of a model on a device. Those of `parameters` and `state`, on the host, are up to date after pull().

    Of the settings it takes seed, step_size, accumulate, ema and clip_norm. With ema, the state has the average of the
    weights besides, in the slot EMA. shards: of which this rank computes its own, one after the other. agreed: see
    Device.replayed; collective.
    """

    def __init__(
        self, kernels: Kernels, model: Layer, parameters: Parameters, task: Task, data: Data, optimizer: Optimizer,
        exchange: DeviceExchange, settings: Config, shards: Shards, agreed: Agreed
    ) -> None:  # fmt: skip
        self.kernels, self.device = kernels, kernels.device
        self.model = fused(model)
        # A model or task of the user's own may go through a chain twice, and its gradients are not final after one.
        self.tells_final = type(self.model) is Chain and type(task) is Classification
        self.parameters, self.task, self.data, self.optimizer = parameters, task, data, optimizer
        self.exchange, self.settings, self.shards, self.agreed = exchange, settings, shards, agreed
        self.state = optimizer.new_state(parameters.size, parameters.vector.dtype)
        self.slots = tuple(self.state)  # those of the optimizer
        if settings.ema:
            self.state[EMA] = parameters.vector.copy()
        self.header = step_header(shards.most)
        # What is summed in whole numbers is a gradient for each shard; the exchange puts the sum into the first. In
        # floats, a rank's shards add to the same gradient.
        K = len(shards.own) if settings.is_exact else 1
        try:
            several = np.zeros((K, parameters.size), parameters.gradient.dtype) if K > 1 else parameters.gradient
        except MemoryError as error:
            raise DistconvError(
                f"--shards {shards.count} on {shards.size} ranks: a gradient for each of a rank's {K} shards does not "
                f"fit into memory ({error}): use more ranks, or fewer shards"
            ) from None
        # What is trained begins where a GPU loads four numbers at once; the six of Standardize stand before it.
        first = parameters.size - parameters.trained_size
        self.vector = self.device.upload(parameters.vector, first)
        self.shares = self.device.upload(several)
        self.rows = self.shares.reshape(K, parameters.size)
        self.gradient, self.values = self.rows[0], parameters.nested(self.vector)
        self.grads_by_shard = [parameters.nested(row) for row in self.rows]
        self.grads = self.grads_by_shard[0]
        self.state_there = {slot: self.device.upload(vector, first) for slot, vector in self.state.items()}
        self.averages = parameters.nested(self.state_there[EMA]) if settings.ema else self.values
        self.mailbox = kernels.mailbox(
            len(self._numbers(0)), settings.step_size, len(task.sums) * settings.accumulate * len(shards.own)
        )
        self.trained = [
            (part, rule) for rule, of in optimizer.rules() for part in parameters.runs(of, apart=optimizer.layerwise)
        ]
        self.untrained = parameters.runs(lambda spec: not spec.trained)
        decays = optimizer.weight_decay and not optimizer.layerwise
        self.decaying = parameters.runs(lambda spec: spec.trained and spec.decay) if decays else []
        # Squared norms of gradients and of their sum tell the noise; of a single gradient, they are the same.
        contributions = shards.count if settings.is_exact else shards.size
        self.notes_squares = contributions > 1 and not exchange.overlaps
        steps = batches(data.size("train"), settings.step_size)
        self.steps_of_a_look = steps_of_a_look(settings.step_size / contributions, steps)
        self.looks, self.square = False, math.nan  # whether this step takes them, and that of the sum
        self.begun: dict[int, Any] = {}  # steps whose results nobody has waited for yet, by their number

    def compute(self, step: int, samples: Samples, global_batch: int, following: Samples | None = None) -> Array:
        """Compute this rank's share of the gradient, and what else of the step needs no host.

        samples (N,) are its part of the batch, and may be none. following: those of the next step, which has the same
        global batch, if it may begin at once. Returns the task's sums over each of its shards, (K, sums) float64.
        """
        if step not in self.begun:
            self._begin(step, samples, global_batch)
        if following is not None and self.exchange.needs_no_host:
            self._begin(step + 1, following, global_batch)
        self.device.wait(self.begun.pop(step))
        count, parts = len(self.task.sums), self.parts(len(samples), global_batch)
        found = np.array(self.mailbox.sums(step)[: len(parts) * count], np.float64).reshape(-1, count)
        sums = np.zeros((len(self.shards.own), count))
        for (k, _), of_part in zip(parts, found, strict=True):
            sums[k] += of_part
        return sums

    def sum(self, step: int, header: Headers) -> Headers:
        """Sum the gradient over the ranks; see Exchange."""
        own, _ = self.mailbox.bad_at(step)
        header["bad_at"] = -1 if own == FINITE else own
        self.looks = self.notes_squares and step % self.steps_of_a_look == 0
        if self.looks:
            header["squares"][: len(self.rows)] = [self._square(row) for row in self.rows]
        return self.exchange.travel(header)

    def update(self, step: int) -> bool:
        """Make the step, if the gradient is finite; whether it was."""
        if not self.exchange.needs_no_host:
            self.device.replayed("update", self._finish)
            self.device.synchronize()
        return self.mailbox.bad_at(step)[1] == FINITE

    def _numbers(self, step: int) -> tuple[float, ...]:
        """What a step needs besides samples: the optimizer's numbers, and how much the average takes of new weights.

        A young average takes more, or the initial weights would stay in it for long.
        """
        numbers = self.optimizer.numbers(step + 1)
        return (*numbers, 1 - min(self.settings.ema, (1 + step) / (10 + step))) if self.settings.ema else numbers

    def _begin(self, step: int, samples: Samples, global_batch: int) -> None:
        self.mailbox.send(step, self._numbers(step), samples)
        whole = self.exchange.needs_no_host

        def work() -> None:
            sums = self._differentiate(len(samples), global_batch)
            self.exchange.before(self.shares, self.mailbox.bad)
            if whole:
                self._finish(sums)
            else:
                self.mailbox.collect(sums)

        try:
            self.device.replayed((len(samples), global_batch), work, self.agreed if whole else None)
        except MemoryError as error:
            raise DistconvError(
                f"{self.kernels.name} has too little memory for this rank's share of a step ({error}): use a smaller "
                f"--batch-size, or more ranks on hosts or GPUs of their own"
            ) from None
        self.mailbox.taken()
        self.begun[step] = self.device.mark()

    def _differentiate(self, n: int, global_batch: int, sends: bool = True) -> Sequence[Any]:
        """Start what gives this rank's share of the gradient -> the task's sums, if it has samples.

        sends: an exchange that can may begin with the numbers that are final.
        """
        kernels, mailbox = self.kernels, self.mailbox
        mailbox.begin(self.shares)
        sums: list[Any] = []
        for k, part in self.parts(n, global_batch):
            samples, last = mailbox.samples[part], part.stop == n
            context = Context(
                training=True,
                seed=self.settings.seed,
                step=mailbox.step,
                samples=samples,
                on_final=self._sender() if sends and last else None,
                kernels=kernels,
                global_batch=global_batch,
            )
            batch, grads = self.data.batch("train", samples, context), self.grads_by_shard[k % len(self.rows)]
            sums += self.task.gradient(self.model, self.values, grads, batch, context)
            self.device.join()
        return sums

    def parts(self, n: int, global_batch: int) -> list[tuple[int, slice]]:
        """The parts of n samples, one after the other, each with the number of its shard; none is empty."""
        parts = []
        for k, shard in enumerate(self.shards.parts(global_batch) if len(self.shards.own) > 1 else [slice(0, n)]):
            size = shard.stop - shard.start
            for i in range(min(size, self.settings.accumulate)):
                part = split(size, self.settings.accumulate, i)
                parts.append((k, slice(shard.start + part.start, shard.start + part.stop)))
        return parts

    def _sender(self) -> Callable[[str], None] | None:
        """What sends off the gradients of a layer of the model, and of those behind it, when they are final."""
        if not self.tells_final:
            return None
        send = self.exchange.sender(self.gradient, self.mailbox.step)
        return None if send is None else lambda layer: send(self.parameters.start(layer))

    def _finish(self, sums: Sequence[Any] = ()) -> None:
        """What follows when the gradient is summed. sums: of the task, if the host does not know of them yet."""
        kernels, mailbox = self.kernels, self.mailbox
        self.exchange.after(self.gradient, mailbox.bad)
        if self.looks:
            self.square = self._square(self.gradient)
        for part in self.decaying:
            kernels.decay(self.vector[part], mailbox.numbers, mailbox.bad)
        slots = [self.state_there[slot] for slot in self.slots]
        numbers = mailbox.numbers[:-1] if self.settings.ema else mailbox.numbers
        if self.settings.clip_norm:
            kernels.clip([self.gradient[part] for part, _ in self.trained], self.settings.clip_norm, mailbox.bad)
        for part, rule in self.trained:
            p, g, *state = (vector[part] for vector in (self.vector, self.gradient, *slots))
            kernels.update(rule, p, g, state, numbers, mailbox.bad)
        for part in self.untrained:
            kernels.add(self.vector[part], self.gradient[part], mailbox.bad)
        if self.settings.ema:
            kernels.average(self.state_there[EMA], self.vector, mailbox.numbers[-1:], mailbox.bad)
        mailbox.collect(sums)

    def _square(self, gradient: Array) -> float:
        """The squared norm of what is trained."""
        return sum(self.kernels.squared_norm(gradient[part]) for part, _ in self.trained)

    def share(self, step: int, samples: Samples, global_batch: int) -> Array:
        """This rank's share of a gradient, on the host until anything else is computed; no step is made.

        (size,), or (K, size) where it has K shards that are summed in whole numbers.
        """
        self.mailbox.send(step, self._numbers(step), samples)
        self._differentiate(len(samples), global_batch, sends=False)
        self.mailbox.taken()
        shares: Array = self.device.download(self.shares)
        return shares

    def sum_shares(self) -> Array:
        """The sum of the last shares over the ranks, likewise; collective."""
        self.exchange.before(self.shares, self.mailbox.bad)
        self.device.synchronize()
        self.exchange.travel(np.zeros((), self.header))
        self.exchange.after(self.gradient, self.mailbox.bad)
        gradient: Array = self.device.download(self.gradient)
        return gradient

    def checksum(self) -> int:
        """A sum over the bits of parameters and optimizer's state: another if one changes; 0 where none is kept."""
        return self.kernels.checksum([self.vector, *self.state_there.values()])

    def pull(self) -> None:
        """Bring the vectors on the host up to date."""
        for here, there in self._both():
            here[...] = self.device.download(there)

    def push(self) -> None:
        """Take them over from the host, where somebody has changed them."""
        self.begun.clear()
        for here, there in self._both():
            self.device.copy(there, self.device.upload(here))

    def _both(self) -> Iterator[tuple[Array, Array]]:
        """Each vector on the host and on the device, where these are two."""
        pairs = [(self.parameters.vector, self.vector)]
        pairs += [(vector, self.state_there[slot]) for slot, vector in self.state.items()]
        return ((here, there) for here, there in pairs if here is not there)
