"""Images per second on many ranks, one a host, from the speed of one rank and of the network; FORMULA says how.

Pure functions of numbers; nothing is measured here. Times in seconds, bandwidths in bits per second each way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distconv.comm import exchange
from distconv.comm.buckets import BUCKET, LEAST, places
from distconv.comm.exchange import HEADER, owners, part_size
from distconv.comm.transport import SECONDS_BETWEEN_LOOKS
from distconv.comm.wire import WIRES
from distconv.errors import BadDataError, MissingInputError
from distconv.run.noise import steps_needed

BACKWARD = 2 / 3  # of the time of a gradient: a product for dx, one for dw, and one in the forward pass
LOOK = SECONDS_BETWEEN_LOOKS / 2  # that what has come lies there, on average, before the thread of buckets sees it
FORMULA = f"""\
step       = compute + exposed; hidden = exchange - exposed
compute    = seconds an image on one rank x images of the largest shard, ceil(batch / P)
exchange   = all-to-all + all-gather over P hosts, where a rank sends each of the others a part of ceil(n / P) numbers:
all-to-all = (P-1) x (latency + message / goodput), rank by rank, or where that is less and every rank has a part
             R x (latency + P/2 x message / goodput), in R = ceil(log2 P) rounds through others
all-gather = R x latency + (P-1) x part / goodput
goodput    = 0.92 x bandwidth: 2896 bytes of content in two Ethernet frames of 1538 and an acknowledgement of 84, for
             all hosts send and receive at once
exposed    = exchange; but from {LEAST:,} numbers on, as --exchange auto does, each bucket of {BUCKET:,} is an exchange
             of its own, which takes {1e3 * LOOK:g} ms longer for each of its 1 + R waits. They follow one another from
             the last numbers down, none before its numbers are final, and those become so evenly over the backward
             pass, {BACKWARD:.3g} of compute. Exposed is what is left at its end: the first numbers' bucket at least.
A part is filled up to a multiple of 256 numbers, a message is a part and {HEADER.itemsize} bytes of header, and
float16 has 16 bits of exponent for each 256 numbers. With fewer such parts than ranks, some ranks have none: they get
headers only, and the all-gather brings as many parts as there are.
Not in it: time to encode and to add up, the core that a hidden exchange takes from the computation, large layers,
which are final at once, and layers of which most numbers lie in the last (then more is hidden) or in the first (then
less), waiting for slow ranks, switches that hold less than all links together, and that small shards take longer an
image than large ones."""
GOAL_FORMULA = """\
steps      = steps at --batch-size x (1 + noise scale / batch) / (1 + noise scale / --batch-size), rounded up
time       = steps x step
This is for a learning rate tuned for each batch (McCandlish et al. 2018); with another, it takes more steps. The noise
scale grows while a model learns: it is to be that of a whole run to the accuracy, not of its last epoch."""
GOODPUT = 2 * 1448 / (2 * 1538 + 84)  # TCP with time stamps, MTU 1500, preamble and gap of the frames included


@dataclass(frozen=True)
class Network:
    """latency: from one rank to another, for a message of no size, the software at both ends included."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Prediction:
    """One step of so many ranks. exchange_seconds: of the whole exchange; exposed_seconds: those of them that are not
    hidden behind the backward pass. efficiency: of P times the images a second of one rank. bytes_sent: by rank 0.
    """

    ranks: int
    wire: str
    batch_size: int
    compute_seconds: float
    exchange_seconds: float
    exposed_seconds: float
    images_per_second: float
    efficiency: float
    bytes_sent: int


@dataclass(frozen=True)
class Goal(Prediction):
    """The same, and how long the training takes to the wanted accuracy."""

    steps: int
    training_seconds: float


def part_bytes(parameters: int, ranks: int, wire: str) -> int:
    """Of what one rank owns, encoded, as comm/exchange.py divides the vector."""
    return WIRES[wire].nbytes(part_size(parameters, ranks))


def bytes_sent(parameters: int, ranks: int, wire: str) -> int:
    """By rank 0, which has a part if any rank has one, in one exchange, headers included, to each rank directly."""
    return exchange.bytes_sent(
        0, ranks, owners(parameters, ranks), HEADER.itemsize, part_bytes(parameters, ranks, wire)
    )


def exchange_seconds(parameters: int, ranks: int, wire: str, network: Network) -> float:
    """Of one exchange, all numbers at once; 0 for one rank."""
    P, have_part = ranks, owners(parameters, ranks)
    byte = 8 / (GOODPUT * network.bandwidth)  # seconds
    part = part_bytes(parameters, P, wire)
    message = HEADER.itemsize + part
    all_to_all = (P - 1) * (network.latency + message * byte)
    if have_part == P:
        all_to_all = min(all_to_all, rounds(P) * (network.latency + P / 2 * message * byte))
    return all_to_all + rounds(P) * network.latency + min(have_part, P - 1) * part * byte


def rounds(ranks: int) -> int:
    """In which each rank can hear of all."""
    return math.ceil(math.log2(ranks))


def in_buckets(parameters: int, ranks: int, wire: str, network: Network, backward: float) -> tuple[float, float]:
    """Seconds of the exchanges of all buckets together, and those from the end of the backward pass on."""
    final, arrived, together = 0.0, 0.0, 0.0  # the first two since the backward pass began
    for place in reversed(places(parameters)):
        n = place.stop - place.start
        seconds = exchange_seconds(n, ranks, wire, network) + (1 + rounds(ranks)) * LOOK
        final += backward * n / parameters
        arrived = max(arrived, final) + seconds
        together += seconds
    return together, arrived - backward


def predict(
    seconds_per_image: float, parameters: int, batch_size: int, ranks: int, wire: str, network: Network
) -> Prediction:
    """One step over a global batch of batch_size images, at least one a rank."""
    compute = seconds_per_image * -(-batch_size // ranks)
    sent = bytes_sent(parameters, ranks, wire)
    whole = exposed = exchange_seconds(parameters, ranks, wire, network)
    if ranks > 1 and parameters >= LEAST:  # as comm/choose.py decides
        sent = sum(bytes_sent(place.stop - place.start, ranks, wire) for place in places(parameters))
        whole, exposed = in_buckets(parameters, ranks, wire, network, BACKWARD * compute)
    images_per_second = batch_size / (compute + exposed)
    return Prediction(
        ranks,
        wire,
        batch_size,
        compute,
        whole,
        exposed,
        images_per_second,
        efficiency=images_per_second * seconds_per_image / ranks,
        bytes_sent=sent,
    )


def ladder(
    seconds_per_image: float,
    parameters: int,
    batch_size: int,
    numbers: Sequence[int],
    wires: Sequence[str],
    network: Network,
    weak: bool,
) -> Iterator[Prediction]:
    """Predictions for numbers of ranks and wires. weak: the batch is that of each rank, else that of the whole job,
    and numbers of ranks that leave a rank without an image are left out.
    """
    for P in numbers:
        batch = batch_size * P if weak else batch_size
        if batch >= P:
            for wire in wires:
                yield predict(seconds_per_image, parameters, batch, P, wire, network)


def with_goal(row: Prediction, noise_scale: float, steps: float, batch_size: int) -> Goal:
    """steps: that batches of batch_size take to the wanted accuracy. noise_scale: in images."""
    needed = steps_needed(steps, noise_scale, row.batch_size, batch_size)
    return Goal(**vars(row), steps=needed, training_seconds=needed * row.batch_size / row.images_per_second)


def table(predictions: Sequence[Prediction]) -> str:
    """For people: a line for each number of ranks, four columns for each wire; with a goal, steps and times too."""
    wires = list(dict.fromkeys(row.wire for row in predictions))
    has_goal = any(isinstance(row, Goal) for row in predictions)
    heads = [
        f"{f'{wire}: hidden':>19}{'exposed':>14} {'images/s':>12} {'efficiency':>10}" + f"{'time':>12}" * has_goal
        for wire in wires
    ]
    lines = [f"{'ranks':>6}" + f"{'steps':>12}" * has_goal + "".join(heads)]
    for P in dict.fromkeys(row.ranks for row in predictions):
        rows = [row for row in predictions if row.ranks == P]
        cells = [
            f"{1e3 * (row.exchange_seconds - row.exposed_seconds):>16,.2f} ms{1e3 * row.exposed_seconds:>11,.2f} ms "
            f"{row.images_per_second:>12,.0f} {row.efficiency:>10.0%}"
            + (f"{row.training_seconds:>10,.4g} s" if isinstance(row, Goal) else "")
            for row in rows
        ]
        steps = f"{rows[0].steps:>12,}" if isinstance(rows[0], Goal) else ""
        lines.append(f"{P:>6}{steps}" + "".join(cells))
    return "\n".join(lines)


def measured_seconds_per_image(path: Path) -> float:
    """Of one rank, from what `bench scaling --json` or `bench step --json` printed.

    Raises MissingInputError; BadDataError where no line is about one rank of distconv.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MissingInputError(
            f"--measured {path} cannot be read: {getattr(error, 'strerror', '') or error}"
        ) from None
    for line in lines:
        try:
            row = json.loads(line)
            speed = float(row["images_per_second"])
            if row["ranks"] == 1 and row.get("engine", "distconv") == "distconv" and 0 < speed < math.inf:
                return 1 / speed
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a line that is about something else
    raise BadDataError(
        f"--measured {path} has no line with the images_per_second of one rank: give it the output of "
        "python -m distconv.bench scaling --ranks 1 --json"
    )
