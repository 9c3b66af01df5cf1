"""The command lines of the benchmarks: what each takes, and what it refuses."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from distconv.benchmarks import BITS_PER_SECOND, ELEMENTS, MOST_NUMBERS, SECONDS, at_least_1, quantity, rank_list
from distconv.command_line import Parser, check_file
from distconv.config import DEVICES, EXACT, MODELS, PRECISIONS, WIRES
from distconv.errors import UsageError

FLOATS = tuple(wire for wire in WIRES if wire not in EXACT)  # what needs no --shards


def step_flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m distconv.bench step",
        description="Time one training step of a network on these ranks, on random images of the shape it is made "
        "for, and show\nwhere the time goes. A barrier before each step; the slowest rank counts; medians. One BLAS "
        "thread a rank, unless\nOMP_NUM_THREADS is set.",
        epilog="examples:\n"
        "  python -m distconv.bench step --png step.png\n"
        "  mpirun -n 2 python -m distconv.bench step --batch-size 100 --evaluate --json\n"
        "  mpirun -n 2 python -m distconv.bench step --against torch     # PyTorch takes turns with it\n"
        "  python -m distconv.bench step --model resnet20 --against torch-compile        # compiled, too, in minutes\n"
        "  python -m distconv.bench step --device cuda --precision tf32 --against torch     # eager, and as a graph\n\n"
        "--json: engine (distconv, torch, torch-ddp, and -compile; on a GPU distconv, distconv-eager, torch, "
        "torch-graph,\ntorch-compile) device ranks threads batch_size wire phase (step, evaluate) median_seconds "
        "images_per_second.",
    )
    parser.add_argument(
        "--batch-size", nargs="+", type=int, metavar="B", help="of all ranks (default: 100 400, on a GPU 4096 too)"
    )
    parser.add_argument(
        "--model", default="deepconvnet", help="as in distconv.train (default: deepconvnet); your own takes 32 x 32 x 3"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="as in distconv.train (default: auto)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of a GPU's products")
    parser.add_argument(
        "--repeats",
        type=int,
        default=20,
        metavar="R",
        help="turns that count, of a step each, on a GPU of four (default: 20)",
    )
    parser.add_argument("--evaluate", action="store_true", help="time the forward pass of an evaluation too")
    parser.add_argument(
        "--against",
        choices=("torch", "torch-compile"),
        help="run PyTorch beside it, on several ranks its DDP; torch-compile: its compiled model, too",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw where the time goes")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    flags = parser.parse_args(argv)
    for batch_size in flags.batch_size or []:
        at_least_1("--batch-size", batch_size)
    at_least_1("--repeats", flags.repeats)
    check_file("--png", flags.png, ".png")
    return flags


def exchange_flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m distconv.bench exchange",
        description="Time the sum of the gradients over these ranks: distconv's on each wire, beside MPI's own "
        "Allreduce.\nThey take turns, with a barrier before each; the slowest rank counts; medians.",
        epilog="examples:\n"
        "  mpirun -n 2 python -m distconv.bench exchange\n"
        "  mpirun -n 8 python -m distconv.bench exchange --largest 64Mi --seconds 300 --png exchange.png\n"
        "  mpirun -n 4 python -m distconv.bench exchange --elements 123552 1Mi --wires float16,float32 --json\n\n"
        "--json: carrier (flat, two-level, buckets, mpi) wire ranks hosts elements median_seconds bytes_sent repeats\n"
        "how. bytes_sent of mpi is the formula for a ring, 2 (P-1)/P of the vector, not a count.",
    )
    parser.add_argument("--elements", nargs="+", metavar="N", help="only these sizes: 123552 or 64Ki or 1Mi")
    parser.add_argument(
        "--largest", default="4Mi", metavar="N", help="of the usual sizes, 1Ki to 64Mi by factors of 4 (default: 4Mi)"
    )
    parser.add_argument(
        "--wires", nargs="+", default=["float16,float32"], metavar="WIRE", help=f"of {', '.join(WIRES)}"
    )
    parser.add_argument("--repeats", type=int, default=200, metavar="R", help="of each at most (default: 200)")
    parser.add_argument("--seconds", default="30", metavar="S", help="that it may take, roughly (default: 30)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it there too")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    flags = parser.parse_args(argv)
    wires = list(dict.fromkeys(",".join(flags.wires).split(",")))
    if not set(wires) <= set(WIRES):
        raise UsageError(f"--wires {','.join(wires)}: expected some of {','.join(WIRES)}")
    elements = [
        int(quantity("--elements", word, ELEMENTS, "64Ki"))
        for word in ",".join(flags.elements or []).split(",")
        if word
    ]
    for size in elements:
        at_least_1("--elements", size, MOST_NUMBERS)
    flags.wires, flags.elements = wires, elements
    flags.largest = quantity("--largest", flags.largest, ELEMENTS, "64Mi")
    flags.seconds = quantity("--seconds", flags.seconds, {"": 1, **SECONDS}, "30")
    at_least_1("--repeats", flags.repeats)
    check_file("--png", flags.png, ".png")
    return flags


def scaling_flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m distconv.bench scaling",
        description="Train on more and more ranks of this machine: images/s, efficiency, and the parts of a step: "
        "compute, wire and\nwait of rank 0. Starts mpirun by itself, twice for each number of ranks. One BLAS thread "
        "a rank, unless\nOMP_NUM_THREADS is set.",
        epilog="examples:\n"
        "  python -m distconv.bench scaling\n"
        "  python -m distconv.bench scaling --ranks 1,2,4,8 --weak --batch-size 50 --png weak.png\n"
        "  python -m distconv.bench scaling --ranks 1 --json > one.json    # for bench predict --measured\n"
        "  # how long until an accuracy is reached that took 400 steps of 100 images, if each rank adds 100\n"
        "  python -m distconv.bench scaling --weak --noise-scale 900 --goal-steps 400",
    )
    parser.add_argument("--ranks", default="1,2,4", metavar="P,...", help="numbers of ranks (default: 1,2,4)")
    parser.add_argument("--batch-size", type=int, default=100, metavar="B", help="images a step (default: 100)")
    parser.add_argument("--weak", action="store_true", help="B images for each rank, not for all of them together")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="measured in each job (default: 30)")
    add_goal(parser)
    parser.add_argument("--data", default="digits", help="as in distconv.train (default: digits)")
    parser.add_argument("--model", default="deepconvnet", help=f"{', '.join(MODELS)}, or your own")
    parser.add_argument("--wire", default="float16", help=f"of {', '.join(FLOATS)} (default: float16)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="as in distconv.train (default: auto)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it there too")
    parser.add_argument("--mpirun", metavar="COMMAND", help="what starts ranks, as 'srun --mpi=pmi2' (default: mpirun)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # this is one of the jobs
    flags = parser.parse_args(argv)
    flags.numbers = rank_list(flags.ranks)
    at_least_1("--steps", flags.steps)
    read_goal(flags)
    at_least_1("--batch-size", flags.batch_size)
    if not flags.weak and flags.batch_size < max(flags.numbers):
        raise UsageError(
            f"--batch-size {flags.batch_size} with {max(flags.numbers)} ranks: every rank needs an image or more; use "
            f"--batch-size {max(flags.numbers)} or more, or --weak"
        )
    return flags


def add_goal(parser: Parser) -> None:
    """The flags that turn a speed into the time to an accuracy."""
    parser.add_argument(
        "--noise-scale", metavar="N", help="of the gradient, in images: predict steps and time to an accuracy too"
    )
    parser.add_argument("--goal-steps", metavar="S", help="that it takes with batches of --batch-size")


def read_goal(flags: argparse.Namespace) -> None:
    if (flags.noise_scale is None) != (flags.goal_steps is None):
        raise UsageError(
            "--noise-scale and --goal-steps go together: --noise-scale 900 --goal-steps 400 says how long it takes to "
            "reach what 400 steps of --batch-size images do"
        )
    if flags.goal_steps is not None:
        flags.noise_scale = quantity("--noise-scale", flags.noise_scale, {"": 1}, "900")
        flags.goal_steps = quantity("--goal-steps", flags.goal_steps, {"": 1}, "400")


def accuracy_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This benchmark's own flags, and those of distconv.train behind --."""
    parser = Parser(
        prog="python -m distconv.bench accuracy",
        usage="python -m distconv.bench accuracy [FLAGS] -- FLAGS OF distconv.train",
        description="Train with several seeds, one job after the other, and show how long it takes to test accuracies "
        "(looked at\nafter each epoch, on the whole test set), and what comes out at the last epoch. Starts mpirun by "
        "itself.",
        epilog="examples:\n"
        "  python -m distconv.bench accuracy --ranks 2 --seeds 10 -- --recipe mnist-fast\n"
        "  python -m distconv.bench accuracy --targets 0.99,0.995 -- --data mnist --epochs 10 --schedule cosine\n\n"
        "--json: seed ranks accuracy training_seconds total_seconds targets (of each reached: seconds of training and "
        "in all).",
    )
    parser.add_argument("--ranks", type=int, default=2, metavar="P", help="(default: 2)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="0 to N - 1 (default: 5)")
    parser.add_argument(
        "--targets", default="0.98,0.99,0.994,0.996", metavar="A,...", help="(default: 0.98,0.99,0.994,0.996)"
    )
    parser.add_argument("--mpirun", metavar="COMMAND", help="what starts ranks, as 'srun --mpi=pmi2' (default: mpirun)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    flags, train = parser.parse_before_dashes(argv)
    at_least_1("--ranks", flags.ranks)
    at_least_1("--seeds", flags.seeds)
    try:
        flags.targets = sorted({float(word) for word in flags.targets.split(",")})
    except ValueError:
        flags.targets = []
    if not flags.targets or not all(0 < target <= 1 for target in flags.targets):
        raise UsageError("--targets: expected fractions above 0 and up to 1, such as 0.98,0.99")
    return flags, train


def predict_flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m distconv.bench predict",
        description="Predict images/s and efficiency on many ranks, one a host, from the speed of one rank and of the "
        "network.\nThe formula is printed with the numbers.",
        epilog="examples:\n"
        "  # deepconvnet on two-core machines and 1 Gbit/s Ethernet\n"
        "  python -m distconv.bench predict --step-seconds-per-image 0.0008 --parameters 123552 --batch-size 100 "
        "\\\n      --latency 50us --bandwidth 1gbit --weak\n"
        "  # a network of 25 million parameters on GPUs and 25 Gbit/s Ethernet\n"
        "  python -m distconv.bench predict --step-seconds-per-image 0.0004 --parameters 25557032 --batch-size 64 "
        "\\\n      --latency 10us --bandwidth 25gbit --weak\n"
        "  # from a measurement of this machine\n"
        "  python -m distconv.bench scaling --ranks 1 --json > one.json\n"
        "  python -m distconv.bench predict --measured one.json --bandwidth 100mbit --png prediction.png\n"
        "  # how long until an accuracy is reached that took 400 steps of 100 images, if each rank adds 100\n"
        "  python -m distconv.bench predict --measured one.json --weak --noise-scale 900 --goal-steps 400 "
        "--ranks 1,4,16,64",
    )
    speed = parser.add_mutually_exclusive_group(required=True)
    speed.add_argument("--step-seconds-per-image", metavar="S", help="of one rank's whole step, exchange left out")
    speed.add_argument("--measured", type=Path, metavar="FILE", help="what bench scaling --json printed for one rank")
    parser.add_argument("--parameters", default="123552", metavar="N", help="or 25Mi (default: 123552, deepconvnet)")
    parser.add_argument("--batch-size", type=int, default=100, metavar="B", help="images a step (default: 100)")
    parser.add_argument("--weak", action="store_true", help="B images for each rank, not for all of them together")
    parser.add_argument("--latency", default="50us", metavar="TIME", help="of a message of no size (default: 50us)")
    parser.add_argument("--bandwidth", default="1gbit", metavar="RATE", help="of a host, each way (default: 1gbit)")
    ladder_of_ranks = ",".join(str(1 << power) for power in range(13))
    parser.add_argument("--ranks", default=ladder_of_ranks, metavar="P,...", help="(default: 1,2,4,...,4096)")
    add_goal(parser)
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it there too")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    flags = parser.parse_args(argv)
    flags.numbers = rank_list(flags.ranks)
    at_least_1("--batch-size", flags.batch_size)
    flags.parameters = int(quantity("--parameters", flags.parameters, ELEMENTS, "123552"))
    at_least_1("--parameters", flags.parameters, MOST_NUMBERS)
    flags.latency_seconds = 0.0 if flags.latency == "0" else quantity("--latency", flags.latency, SECONDS, "50us")
    flags.bits_per_second = quantity("--bandwidth", flags.bandwidth, BITS_PER_SECOND, "1gbit")
    per_image = flags.step_seconds_per_image
    seconds = 0.0
    if per_image is not None:
        seconds = quantity("--step-seconds-per-image", per_image, {"": 1, **SECONDS}, "0.001")
    flags.step_seconds_per_image = seconds
    read_goal(flags)
    check_file("--png", flags.png, ".png")
    return flags
