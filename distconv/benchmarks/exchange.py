"""How long the sum over the ranks takes: ours on each wire, and MPI's own Allreduce, measured side by side.

The variants of a size take turns, so that a disturbance of the machine meets all of them. Each turn begins with a
barrier and takes as long as its slowest rank. What a variant does besides bringing the sum to all ranks in the type of
the gradient is not in its time; ours carries the header of a training step, MPI's is the bare Allreduce.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distconv.comm.choose import choose
from distconv.comm.exact import ALL_WIRES
from distconv.comm.exchange import HEADER
from distconv.comm.world import World
from distconv.errors import UsageError
from distconv.kernels.interface import Array

MODEL = 123_552  # parameters of deepconvnet with images of 28 x 28 pixels and 10 classes
SIZES = tuple(4**power for power in range(5, 14))  # elements: 1 Ki to 64 Mi
LARGEST = 4 << 20  # elements, unless asked for more
LEAST_REPEATS = 3
LATENCIES_END = 64 << 10  # elements from which on the time grows with the size, roughly
BYTES_AN_ELEMENT = 80  # of memory that a rank needs for all variants of a size and the smaller ones, roughly
RATIO_THAT_MATTERS = 0.95  # of float16's time to float32's: what lies above is noise


@dataclass(frozen=True)
class Row:
    """One variant at one size. bytes_sent: by a rank to others; of MPI's own it is what a ring sends, not counted."""

    carrier: str
    wire: str
    ranks: int
    hosts: int
    elements: int
    median_seconds: float
    bytes_sent: int
    repeats: int
    how: str  # the carrier with what it runs over


@dataclass(frozen=True)
class Variant:
    """A way to sum: what is in the time, and what must be done before."""

    carrier: str
    wire: str
    bytes_sent: int
    how: str
    prepare: Callable[[], object]
    sum: Callable[[], object]


def measure(
    world: World,
    sizes: Sequence[int],
    wires: Sequence[str],
    repeats: int,
    seconds: float,
    note: Callable[[str], None],
) -> Iterator[list[Row]]:
    """The rows of each size, small sizes first, by at most so many repeats and in about so many seconds; collective.

    Sizes that the seconds do not suffice for are left out, but never the model's; note tells of what is left out.
    Raises UsageError for what this job cannot have.
    """
    with world.together():
        if world.size == 1:
            raise UsageError("bench exchange: one rank has nobody to exchange with; start it with mpirun -n 2 or more")
    check_memory(world, max(sizes))
    library_wires = [wire for wire in ("float32", "float64", "float16") if wire in wires or wire == "float32"]
    try:
        choose(world, 1, library_wires[-1], "mpi")
    except UsageError as error:
        note(f"MPI's own float16 is left out: {error}")
        library_wires.remove("float16")

    ends, an_element, left_out = time.monotonic() + seconds, 0.0, []
    sizes = sorted(set(sizes))
    for number, size in enumerate(sizes):
        remaining = world.comm.bcast(ends - time.monotonic())
        if remaining < (LEAST_REPEATS + 2) * an_element * size and size != MODEL:
            left_out.append(f"{size:,}")
            continue
        variants = list(make_variants(world, size, wires, library_wires))
        share = remaining / (2 * (len(sizes) - number) - 1)  # the large sizes need more than the small ones
        rows, round_seconds = take_turns(world, size, variants, repeats, share)
        an_element = round_seconds / max(size, LATENCIES_END)
        yield rows
    if left_out:
        note(f"{', '.join(left_out)} elements are left out: {seconds:g} s do not suffice; give more --seconds")


def check_memory(world: World, elements: int) -> None:
    """Raise UsageError where the ranks of a host would need more memory than it has free; collective."""
    needed = elements * BYTES_AN_ELEMENT * world.local_size
    with world.together():
        try:
            with open("/proc/meminfo") as lines:  # noqa: PTH123 (a file of the kernel)
                free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return
        if needed > free:
            raise UsageError(
                f"{elements:,} elements: {world.local_size} ranks on a host need about {needed / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} GiB are free; give smaller --elements"
            )


def make_variants(world: World, size: int, wires: Sequence[str], library_wires: Sequence[str]) -> Iterator[Variant]:
    """All ways to sum vectors (size,), the one that training takes by itself first; collective."""
    gradient = np.random.default_rng(world.rank).standard_normal(size, np.float32) * np.float32(0.01)
    for wire in wires:
        yield (first := ours(world, gradient, wire, "auto"))
        if first.carrier != "flat":
            yield ours(world, gradient, wire, "flat")
    for wire in library_wires:
        yield library(world, gradient.astype(wire), wire)


def ours(world: World, gradient: Array, wire: str, kind: str) -> Variant:
    exchange = choose(world, gradient.size, wire, kind)
    vector, header = np.zeros(gradient.size, ALL_WIRES[wire].dtype), np.zeros((), HEADER)
    return Variant(
        exchange.carrier,
        wire,
        exchange.bytes_sent,
        exchange.how,
        prepare=lambda: np.copyto(vector, gradient),
        sum=lambda: exchange.sum(vector, header),
    )


def library(world: World, gradient: Array, wire: str) -> Variant:
    P, total = world.size, np.zeros_like(gradient)
    return Variant(
        "mpi",
        wire,
        round(2 * (P - 1) / P * gradient.nbytes),
        "mpi, the library's own Allreduce",
        prepare=lambda: None,
        sum=lambda: world.comm.Allreduce(gradient, total),
    )


def take_turns(
    world: World, size: int, variants: Sequence[Variant], most: int, seconds: float
) -> tuple[list[Row], float]:
    """Time each variant up to `most` times, slow ones less often. Returns the rows, and the seconds of a round."""

    def turn(variant: Variant) -> float:
        variant.prepare()
        world.comm.Barrier()
        began = time.perf_counter()
        variant.sum()
        return time.perf_counter() - began

    for variant in variants:
        turn(variant)  # touches its memory
    trial = slowest_rank(world, [turn(variant) for variant in variants])
    share = seconds / len(variants)
    repeats = [max(LEAST_REPEATS, min(most, int(share / max(once, 1e-9)))) for once in trial]
    rounds = max(repeats)
    times: list[list[float]] = [[] for _ in variants]
    for done in range(rounds):
        for variant, count, own in zip(variants, repeats, times, strict=True):
            if (done + 1) * count // rounds > done * count // rounds:  # `count` of the rounds, evenly spread
                own.append(turn(variant))
    rows = [
        Row(
            variant.carrier,
            variant.wire,
            world.size,
            world.hosts,
            size,
            float(np.median(slowest_rank(world, own))),
            variant.bytes_sent,
            len(own),
            variant.how,
        )
        for variant, own in zip(variants, times, strict=True)
    ]
    return rows, float(trial.sum())


def slowest_rank(world: World, seconds: Sequence[float]) -> Array:
    """The largest of the ranks' times, for each of several turns; collective."""
    return np.max(world.comm.allgather(seconds), axis=0)  # type: ignore[no-any-return]


def heading(rows: Sequence[Row]) -> str:
    """Of the lines of sizes that have these variants."""
    return f"{'elements':>10}" + "".join(f"{row.carrier} {row.wire}".rjust(19) for row in rows)


def line(rows: Sequence[Row]) -> str:
    """One size: the median of each variant in ms, and that as a multiple of MPI's float32."""
    base = next(row.median_seconds for row in rows if (row.carrier, row.wire) == ("mpi", "float32"))
    cells = [f"{1e3 * row.median_seconds:.4g} ({row.median_seconds / base:.2f})" for row in rows]
    return f"{rows[0].elements:>10,}" + "".join(cell.rjust(19) for cell in cells)


def advice(rows: Sequence[Row]) -> str:
    """What to use for deepconvnet, or else for the largest size there is: one sentence from the rows of all sizes."""
    elements = MODEL if any(row.elements == MODEL for row in rows) else max(row.elements for row in rows)
    mine = [row for row in rows if row.elements == elements and row.carrier != "mpi"]
    half, full = (next((row for row in mine if row.wire == wire), None) for wire in ("float16", "float32"))
    if half is None or full is None:
        return "no advice: it takes both float16 and float32 in --wires"
    ms, full_ms = 1e3 * half.median_seconds, 1e3 * full.median_seconds
    if ms <= RATIO_THAT_MATTERS * full_ms:
        return f"float16 saves {full_ms - ms:.3g} of {full_ms:.3g} ms a step for {elements:,} parameters here: use it"
    compared = "as fast" if full_ms > RATIO_THAT_MATTERS * ms else "faster"
    return (
        f"do not use float16 for {elements:,} parameters here: float32 is {compared} ({full_ms:.3g} ms a step, and "
        f"{ms:.3g} ms in float16)"
    )
