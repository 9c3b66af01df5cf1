"""How long the sum over the ranks takes: ours on each wire, and MPI's own Allreduce, measured side by side.

The variants of a size take turns, so that a disturbance of the machine meets all of them. Each turn begins with a
barrier and takes as long as its slowest rank. What a variant does besides bringing the sum to all ranks in the type of
the gradient is not in its time; ours carries the header of a training step, MPI's is the bare Allreduce.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """A way to sum: what is in the time, and what must be done before, and at the end."""

    carrier: str
    wire: str
    bytes_sent: int
    how: str
    prepare: Callable[[], object]
    sum: Callable[[], object]
    close: Callable[[], object]


def measure(
    world: World,
    sizes: Sequence[int],
    wires: Sequence[str],
    repeats: int,
    seconds: float,
    note: Callable[[str], None],
) -> Iterator[list[Row]]:
    """The rows of each size, small sizes first, by at most so many repeats and in about so many seconds; collective.

    Sizes that the seconds do not suffice for are left out, but never the first and the model's; note tells of what is.
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
        if remaining < (LEAST_REPEATS + 2) * an_element * size and number > 0 and size != MODEL:
            left_out.append(f"{size:,}")
            continue
        variants = list(make_variants(world, size, wires, library_wires))
        share = remaining / (2 * (len(sizes) - number) - 1)  # the large sizes need more than the small ones
        rows, round_seconds = take_turns(world, size, variants, repeats, share)
        for variant in variants:
            variant.close()
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
        close=exchange.close,
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
        close=lambda: None,
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
    """What to use for deepconvnet and for the largest size, and what brings nothing: up to three sentences, in lines.

    rows: of all sizes. A wire is weighed against float32, which rounds less: MPI's own, which a user has without ours,
    and ours, if it is among the rows. Of several carriers the first row of a size counts, which training takes itself.
    """
    library = {row.elements: row.median_seconds for row in rows if (row.carrier, row.wire) == ("mpi", "float32")}
    sizes = sorted(library)
    ours: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.carrier != "mpi":
            ours.setdefault(row.wire, {}).setdefault(row.elements, row.median_seconds)
    plain = ours.get("float32", library)
    sentences = ["; ".join(choice(n, ours, library) for n in dict.fromkeys([*{MODEL} & {*sizes}, sizes[-1]]))]
    gains_nothing = {
        wire: [n for n in sizes if seconds[n] > RATIO_THAT_MATTERS * min(library[n], plain[n])]
        for wire, seconds in ours.items()
        if wire != "float32"
    }
    warned = [f"{wire} for {spans(found, sizes)}" for wire, found in gains_nothing.items() if found]
    if warned:
        sentences.append(f"do not use {', nor '.join(warned)}: float32, ours or MPI's, is as fast or faster there")
    if slow := [n for n in sizes if library[n] < RATIO_THAT_MATTERS * plain[n]]:
        sentences.append(
            f"our float32 is slower than MPI's for {spans(slow, sizes)}: --exchange mpi --wire float32 takes that, but "
            "the header of a step comes on top"
        )
    return "\n".join(sentences)


def choice(elements: int, ours: Mapping[str, Mapping[int, float]], library: Mapping[int, float]) -> str:
    """What is fastest at one size, where a wire that rounds more must be faster by so much that it matters."""
    name, best = "MPI's own float32", library[elements]
    if (seconds := ours.get("float32", {}).get(elements, math.inf)) <= best / RATIO_THAT_MATTERS:
        name, best = "float32", seconds
    for wire in ("float16", "int8"):
        if (seconds := ours.get(wire, {}).get(elements, math.inf)) <= RATIO_THAT_MATTERS * best:
            name, best = wire, seconds
    ratio = "" if name.startswith("MPI") else f", {best / library[elements]:.2f} times MPI's float32"
    return f"for {elements:,} parameters use {name}: {1e3 * best:.3g} ms a step{ratio}"


def spans(some: Sequence[int], sizes: Sequence[int]) -> str:
    """Some of the ascending sizes, neighbours as one: 1,024 to 65,536 and 1,048,576 parameters."""
    if len(some) == len(sizes) > 1:
        return "any size measured"
    runs = [
        [n for _, n in run]
        for _, run in itertools.groupby(enumerate(some), lambda placed: sizes.index(placed[1]) - placed[0])
    ]
    return " and ".join(f"{run[0]:,} to {run[-1]:,}" if len(run) > 1 else f"{run[0]:,}" for run in runs) + " parameters"
