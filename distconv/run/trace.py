"""`--trace FILE`: where the time of every rank goes, on one clock.

Some steps are shown from the inside, after the first ones of a process, which compile and touch memory; of the whole
run, what is rare: evaluation, agreement, saving. Between them nothing is intercepted. The file is written when those
steps are done, so that a later accident takes nothing, and again at the end.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distconv import __version__
from distconv.comm.buckets import Buckets
from distconv.comm.clocks import read_clocks
from distconv.comm.exact import Exact
from distconv.comm.exchange import TwoLevel
from distconv.comm.mpi_allreduce import Library
from distconv.comm.on_gpu import CudaMpi, OnGpu
from distconv.comm.shared_memory import SharedSpace
from distconv.comm.transport import Messages, SharedMemory
from distconv.comm.wire import Wire
from distconv.run import agreement, ending
from distconv.run.log import RunLog
from distconv.run.loop import EpochRecord, Record, StepRecord
from distconv.run.run import Run
from distconv.run.saver import Saver
from distconv.run.spans import DEVICE, Span, Spans, traced
from distconv.run.trace_file import OfRank, joined, write_trace

COLD = 3  # steps of a process that are not shown, if there are enough others
MOST = 1000  # spans of a rank that are not of the inside of a step: a run may save for days
CARRIES = (("scatter", "scatter"), ("gather", "gather"))
# What an exchange is made of, and which of its methods are spans of which names, the inner ones first. In shared
# memory, to scatter and to gather is to wait for the others.
METHODS: tuple[tuple[type, tuple[tuple[str, str], ...]], ...] = (
    (Wire, (("encode", "encode"), ("sum_and_encode", "sum"), ("decode", "decode"))),
    (Messages, CARRIES),
    (SharedMemory, (("scatter", "wait"), ("gather", "wait"), *CARRIES)),
    (SharedSpace, (("barrier", "wait"),)),
    (CudaMpi, CARRIES),
    (TwoLevel, (("sum_of_host", "sum"),)),
    (Exact, (("find_peaks", "encode"), ("encode", "encode"), ("decode", "decode"))),
    (Buckets, (("sum", "wait"),)),
    (Library, (("sum", "allreduce"),)),
)


class Trace:
    """The recorder of a run, and of its file; made, and called, by all ranks together."""

    def __init__(self, run: Run, saver: Saver, log: RunLog) -> None:
        self.run, self.log, self.path = run, log, Path(run.config.trace)
        left = run.steps - run.step
        self.wanted = min(run.config.trace_steps, left)
        self.cold = min(COLD, left - self.wanted)
        self.steps: list[int] = []  # that are shown from the inside
        self.told = False
        self.inside: Inside | None = None
        self.spans: list[Span] = []  # of the inside
        self.about_gpu: dict[str, Any] = {}
        self.readings = [read_clocks(run.world)]
        self.rare = Spans(MOST)
        self.rare.intercept(agreement, "agree", "agree")
        self.rare.intercept(run, "measure", "evaluate")
        self.rare.intercept(ending, "answer", "evaluate")
        if run.world.rank == 0:
            self.rare.intercept(saver, "save", "save")

    def watch(self, records: Iterator[Record]) -> Iterator[Record]:
        """The same records, and spans of how they came about."""
        done = 0
        while True:
            if self.wanted and done == self.cold and not self.steps and self.inside is None:
                self.inside = Inside(self.run)
            began = time.perf_counter_ns()
            record = next(records, None)
            ended = time.perf_counter_ns()
            if record is None:
                return
            if isinstance(record, EpochRecord):
                self.rare.note("end of epoch", "", began, ended)
            elif isinstance(record, StepRecord):
                done += 1
                if self.inside:
                    self.steps.append(record.step)
                    self.inside.host.note(f"step {record.step}", "", began, ended)
            yield record
            if self.inside and len(self.steps) == self.wanted:
                self._close_inside()
                self._write()

    def close(self) -> None:
        """Note no more, and write the file. Raises StorageError on all ranks."""
        self._close_inside()
        self.rare.release()
        self._write()

    def _close_inside(self) -> None:
        if self.inside:
            self.spans = self.inside.close()
            self.about_gpu = self.inside.about_gpu
            self.inside = None

    def _write(self) -> None:
        world, config = self.run.world, self.run.config
        self.readings.append(read_clocks(world))
        clock = world.local.bcast(world.rank)
        mine = OfRank(socket.gethostname(), clock, [*self.rare.noted, *self.spans], self.rare.left_out)
        everyone = world.comm.gather(mine)
        about = {
            "distconv": __version__,
            "model": config.model,
            "exchange": self.run.replica.exchange.how,
            "steps": self.steps,
            **self.about_gpu,
        }
        world.on_rank_0(lambda: write_trace(self.path, everyone, self.readings, about))
        if not self.told:
            shown = f" of steps {self.steps[0]:,} to {self.steps[-1]:,}" if self.steps else ""
            self.log.say(f"trace{shown} in {self.path}: open it in ui.perfetto.dev")
            self.told = True


class Inside:
    """The inside of steps, from its making to its close; what a GPU does is on a timeline of its own.

    A step that is replayed as a graph shows nothing of its inside, so here a GPU's kernels start one by one.
    """

    def __init__(self, run: Run) -> None:
        replica = run.replica
        self.replica, self.model = replica, replica.model
        self.host = self.layers = Spans()
        self.device: Spans | None = None
        self.about_gpu: dict[str, Any] = {}
        if replica.kernels.name != "cpu":
            self._start_device(replica.device)
        for method, name in (
            ("compute", "compute"), ("sum", "exchange"), ("update", "update"), ("checksum", "checksum")
        ):  # fmt: skip
            self.host.intercept(replica, method, name)
        if hasattr(replica.data, "__dict__"):  # a user's own may have none
            self.layers.intercept(replica.data, "batch", "batch")
        replica.model = traced(replica.model, self.layers)
        for part in _parts(replica.exchange):
            self._look_into(part)

    def close(self) -> list[Span]:
        """Give everything back as it was. Returns the spans, in nanoseconds of the host's clock."""
        self.host.release()
        self.replica.model = self.model
        return joined(self.host.noted) + self._close_device()

    def _look_into(self, part: object) -> None:
        for kind, methods in METHODS:
            if isinstance(part, kind):
                for method, name in methods:
                    self.host.intercept(part, method, name)
        if isinstance(part, TwoLevel):
            self.host.intercept(part.inner, "exchange", "between hosts")
        elif isinstance(part, Buckets):
            for number, exchange in enumerate(part.exchanges, start=1):
                self.host.intercept(exchange, "sum", f"bucket {number}")
        elif isinstance(part, Messages) and part.patient:  # else MPI waits within scatter and gather
            self.host.intercept(part, "_wait", "wait")
        elif isinstance(part, OnGpu) and part.needs_no_host:
            for method, name in CARRIES:
                self.layers.intercept(part.transport, method, name)

    def _start_device(self, device: Any) -> None:
        """Note what the GPU does by events between its kernels, and bring its clock beside the host's."""
        device.synchronize()
        began = time.perf_counter_ns()
        self.first_stamp = device.stamp()
        device.synchronize()
        ended = time.perf_counter_ns()
        self.first_time = (began + ended) // 2
        self.about_gpu = {
            "gpu": "in these steps its kernels were started one by one, not replayed as a graph, which takes longer; "
            "what it does beside its first stream is not shown",
            "gpu_clock_error_us": (ended - began) / 2000,
        }
        self.replayed, device.records = device.records, False
        self.device = self.layers = Spans(now=device.stamp, timeline=DEVICE)
        self.device.intercept(self.replica, "_finish", "update")
        self.device.intercept(self.replica.exchange, "before", "before exchange")
        self.device.intercept(self.replica.exchange, "after", "after exchange")

    def _close_device(self) -> list[Span]:
        if self.device is None:
            return []
        device = self.replica.device
        self.device.release()
        device.records = self.replayed
        device.synchronize()

        def at(stamp: Any) -> int:
            return self.first_time + int(device.nanoseconds(self.first_stamp, stamp))

        return [(name, way, at(begin), at(end), timeline) for name, way, begin, end, timeline in self.device.noted]


def _parts(exchange: object) -> Iterator[object]:
    """An exchange and what it is made of, each once."""
    found: dict[int, object] = {}
    left = [exchange]
    while left:
        part = left.pop()
        if id(part) in found:
            continue
        found[id(part)] = part
        yield part
        left += [getattr(part, name) for name in ("inner", "transport", "space", "wire") if hasattr(part, name)]
        left += getattr(part, "exchanges", [])
