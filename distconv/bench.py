"""`python -m distconv.bench step|exchange|scaling|predict`: what a machine gives. Flags -> wiring -> printing."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from distconv.benchmarks import BITS_PER_SECOND, ELEMENTS, SECONDS, at_least_1, quantity, rank_list
from distconv.comm.start import run_command, start
from distconv.comm.world import BLAS_THREADS, blas_threads
from distconv.config import DEVICES, MODELS, PRECISIONS, WIRES, Config, Parser
from distconv.errors import CannotCreateError, UsageError
from distconv.supervise.launcher import end_on_sigterm, job_starter, refuse_to_nest


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in BENCHMARKS:
        return BENCHMARKS[argv[0]](argv[1:])
    parser = Parser(
        prog="python -m distconv.bench",
        usage="python -m distconv.bench BENCHMARK [--help] ...",
        description="Measure what this machine and its network give, or predict what another one would.",
        epilog="examples:\n"
        "  python -m distconv.bench step                     # one training step: how fast, and where the time goes\n"
        "  mpirun -n 2 python -m distconv.bench exchange     # the sum of the gradients over the ranks, and MPI's own\n"
        "  python -m distconv.bench scaling                  # training on 1, 2 and 4 ranks, and where the time goes\n"
        "  python -m distconv.bench predict --help           # training on up to 4096 ranks of another machine",
    )
    parser.add_argument("benchmark", choices=tuple(BENCHMARKS), metavar="BENCHMARK", help=", ".join(BENCHMARKS))
    parser.parse_args(argv[:1])
    return 0


def step(argv: Sequence[str]) -> int:
    """Measures the ranks that it is started in."""
    parser = Parser(
        prog="python -m distconv.bench step",
        description="Time one training step of deepconvnet on these ranks, on random images of MNIST's shape, and show "
        "where the\ntime goes. A barrier before each step; the slowest rank counts; medians. One BLAS thread a rank, "
        "unless\nOMP_NUM_THREADS is set.",
        epilog="examples:\n"
        "  python -m distconv.bench step --png step.png\n"
        "  mpirun -n 2 python -m distconv.bench step --batch-size 100 --evaluate --json\n"
        "  mpirun -n 2 python -m distconv.bench step --against torch     # PyTorch takes turns with it\n"
        "  python -m distconv.bench step --device cuda --precision tf32 --against torch     # eager, and as a graph\n"
        "  python -m distconv.bench step --device cuda --against torch-compile     # compiled too, in minutes\n\n"
        "--json: engine (distconv, torch, torch-ddp; on a GPU distconv, distconv-eager, torch, torch-graph, "
        "torch-compile)\ndevice ranks threads batch_size wire phase (step, evaluate) median_seconds images_per_second.",
    )
    parser.add_argument(
        "--batch-size", nargs="+", type=int, metavar="B", help="of all ranks (default: 100 400, on a GPU 4096 too)"
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
        help="run PyTorch beside it, on several ranks its DDP; torch-compile: on a GPU, its compiled model too",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw where the time goes")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    flags = parser.parse_args(argv)
    at_least_1("--batch-size", min(flags.batch_size or [1]))
    at_least_1("--repeats", flags.repeats)
    check_png(flags.png)
    one_blas_thread()

    with start() as world, contextlib.ExitStack() as rivals:
        from distconv.benchmarks import step as benchmark
        from distconv.comm.placement import place
        from distconv.run.log import RunLog

        world.agree("the command line", repr(argv), "start all ranks alike")
        device = "cpu" if place(world, flags.device, flags.precision).ordinal is None else "cuda"
        sizes = sorted(set(flags.batch_size or ([100, 400] if device == "cpu" else [100, 400, 4096])))
        with world.together():
            if sizes[0] < world.size:
                raise UsageError(
                    f"--batch-size {sizes[0]} with {world.size} ranks: every rank needs at least one image"
                )
        log, threads = RunLog(world.rank == 0), blas_threads()
        rival = None
        if flags.against:
            from distconv.benchmarks import torch_step

            compiled = flags.against == "torch-compile"
            rival = rivals.enter_context(torch_step.rivals(world, threads, device, flags.precision, compiled))
        if device == "cpu":
            bench = benchmark.bench_cpu(world)
        else:
            from distconv.benchmarks.gpu_step import bench_gpu

            bench = bench_gpu(world, flags.precision, log.say_aside)
        many = f"{world.size} rank{'s' * (world.size > 1)} x {threads} thread{'s' * (threads > 1)}"
        title = f"deepconvnet, {many}, {device}" + f" in {flags.precision}" * (device == "cuda")
        if not flags.json:
            log.say(f"{title}: medians of {flags.repeats}\n{benchmark.HEAD}")
        results = []
        for batch_size in sizes:
            engines, look_inside = bench(batch_size, flags.repeats)
            dataset = benchmark.random_dataset(batch_size, 0)
            engines += rival(dataset, batch_size) if rival else []
            rows: list[benchmark.Row] = []
            for phase in ("step", "evaluate") if flags.evaluate else ("step",):
                of_phase = benchmark.measure(world, engines, device, batch_size, threads, phase, flags.repeats)
                text = benchmark.table(of_phase)
                log.say("\n".join(json.dumps(asdict(row)) for row in of_phase) if flags.json else text)
                rows += of_phase  # said at once, as what follows may fail
            results.append(look_inside(rows))
        if not flags.json:
            for _, text in results:
                log.say(f"\n{text}" + ", PyTorch's among them" * (rival is not None and device == "cpu"))
        with world.together():
            if flags.png and world.rank == 0:
                from distconv.run.plots import draw_step

                parts = [(size, part) for size, (part, _) in zip(sizes, results, strict=True)]
                draw(flags.png, lambda: draw_step(parts, title, flags.png))
    return 0


def exchange(argv: Sequence[str]) -> int:
    """Measures the ranks that it is started in."""
    parser = Parser(
        prog="python -m distconv.bench exchange",
        description="Time the sum of the gradients over these ranks: distconv's on each wire, beside MPI's own "
        "Allreduce.\nThey take turns, with a barrier before each; the slowest rank counts; medians.",
        epilog="examples:\n"
        "  mpirun -n 2 python -m distconv.bench exchange\n"
        "  mpirun -n 8 python -m distconv.bench exchange --largest 64Mi --seconds 300\n"
        "  mpirun -n 4 python -m distconv.bench exchange --elements 123552 1Mi --wires float16,float32 --json\n\n"
        "--json: carrier (flat, two-level, buckets, mpi) wire ranks hosts elements median_seconds bytes_sent repeats\n"
        "how. bytes_sent of mpi is the formula for a ring, 2 (P-1)/P of the vector, not a count.",
    )
    parser.add_argument("--elements", nargs="+", metavar="N", help="only these sizes: 123552 or 64Ki or 1Mi")
    parser.add_argument(
        "--largest", default="4Mi", metavar="N", help="of the usual sizes, 1Ki to 64Mi by factors of 4 (default: 4Mi)"
    )
    parser.add_argument(
        "--wires", nargs="+", default=["float16,bfloat16,float32"], metavar="WIRE", help=f"of {', '.join(WIRES)}"
    )
    parser.add_argument("--repeats", type=int, default=200, metavar="R", help="of each at most (default: 200)")
    parser.add_argument("--seconds", default="30", metavar="S", help="that it may take, roughly (default: 30)")
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
        at_least_1("--elements", size)
    largest = quantity("--largest", flags.largest, ELEMENTS, "64Mi")
    seconds = quantity("--seconds", flags.seconds, {"": 1, **SECONDS}, "30")
    at_least_1("--repeats", flags.repeats)

    with start() as world:
        from distconv.benchmarks import exchange as benchmark
        from distconv.run.log import RunLog

        world.agree("the command line", repr(argv), "start all ranks alike")
        log, columns = RunLog(world.rank == 0), ""
        rows: list[benchmark.Row] = []
        sizes = elements or [*(n for n in benchmark.SIZES if n <= largest), benchmark.MODEL]
        for of_one_size in benchmark.measure(world, sizes, wires, flags.repeats, seconds, log.say_aside):
            rows += of_one_size
            if flags.json:
                for row in of_one_size:
                    log.say(json.dumps(asdict(row)))
            else:
                if not columns:
                    hosts = f"{world.hosts} host{'s' * (world.hosts > 1)}"
                    log.say(f"{world.size} ranks on {hosts}, {world.library}: median ms (and times MPI's float32)")
                if columns != (columns := benchmark.heading(of_one_size)):
                    log.say(columns)
                log.say(benchmark.line(of_one_size))
        if not flags.json:
            for carrier, how in {row.carrier: row.how for row in rows}.items():
                log.say(f"{carrier}: {how.removeprefix(carrier).removeprefix(', ')}")
            log.say(benchmark.advice(rows))
    return 0


def scaling(argv: Sequence[str]) -> int:
    """Starts jobs of itself, with --worker."""
    parser = Parser(
        prog="python -m distconv.bench scaling",
        description="Train on more and more ranks of this machine: images/s, efficiency, and the parts of a step: "
        "compute, wire and\nwait of rank 0. Starts mpirun by itself, twice for each number of ranks. One BLAS thread "
        "a rank, unless\nOMP_NUM_THREADS is set.",
        epilog="examples:\n"
        "  python -m distconv.bench scaling\n"
        "  python -m distconv.bench scaling --ranks 1,2,4,8 --weak --batch-size 50 --png weak.png\n"
        "  python -m distconv.bench scaling --ranks 1 --json > one.json    # for bench predict --measured",
    )
    parser.add_argument("--ranks", default="1,2,4", metavar="P,...", help="numbers of ranks (default: 1,2,4)")
    parser.add_argument("--batch-size", type=int, default=100, metavar="B", help="images a step (default: 100)")
    parser.add_argument("--weak", action="store_true", help="B images for each rank, not for all of them together")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="measured in each job (default: 30)")
    parser.add_argument("--data", default="digits", help="as in distconv.train (default: digits)")
    parser.add_argument("--model", default="deepconvnet", help=f"{', '.join(MODELS)}, or your own")
    parser.add_argument("--wire", default="float16", help=f"of {', '.join(WIRES)} (default: float16)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="as in distconv.train (default: auto)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it there too")
    parser.add_argument("--mpirun", metavar="COMMAND", help="what starts ranks, as 'srun --mpi=pmi2' (default: mpirun)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # this is one of the jobs
    flags = parser.parse_args(argv)
    numbers = rank_list(flags.ranks)
    at_least_1("--steps", flags.steps)
    at_least_1("--batch-size", flags.batch_size)
    if not flags.weak and flags.batch_size < max(numbers):
        raise UsageError(
            f"--batch-size {flags.batch_size} with {max(numbers)} ranks: every rank needs at least one image; use "
            f"--batch-size {max(numbers)} or more, or --weak"
        )

    def batch_size(P: int) -> int:
        return int(flags.batch_size) * (P if flags.weak else 1)

    def settings(P: int) -> Config:
        names = ("data", "model", "wire", "device")
        return Config(**{name: getattr(flags, name) for name in names}, batch_size=batch_size(P), epochs=1)

    if flags.worker:
        with start() as world:
            from distconv.benchmarks.scaling import work

            steps = work(settings(world.size), flags.steps, world)
            if world.rank == 0:
                print("\n".join(json.dumps(asdict(step)) for step in steps), flush=True)
        return 0

    refuse_to_nest("bench scaling")
    starter = job_starter(flags.mpirun)
    end_on_sigterm()
    settings(1)  # raises for a value that cannot be before anything is started
    check_png(flags.png)
    one_blas_thread()
    from distconv.benchmarks.scaling import climb, table
    from distconv.run.log import RunLog

    arguments = ["-m", "distconv.bench", "scaling", *argv, "--worker"]
    rungs = climb(starter, numbers, batch_size, flags.wire, arguments, RunLog(True).say_aside)
    what = (
        f"weak scaling, batch {flags.batch_size} a rank" if flags.weak else f"strong scaling, batch {flags.batch_size}"
    )
    title = f"{flags.model} on {flags.data}, {flags.wire} on the wire: {what}"
    print("\n".join(json.dumps(asdict(rung)) for rung in rungs) if flags.json else f"{title}\n{table(rungs)}")
    if flags.png:
        from distconv.run.plots import draw_scaling

        draw(flags.png, lambda: draw_scaling([asdict(rung) for rung in rungs], title, flags.png))
    return int(len(rungs) < len(numbers))


def predict(argv: Sequence[str]) -> int:
    """Arithmetic: starts no MPI."""
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
        "  python -m distconv.bench predict --measured one.json --bandwidth 100mbit",
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
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    flags = parser.parse_args(argv)
    numbers = rank_list(flags.ranks)
    at_least_1("--batch-size", flags.batch_size)
    parameters = int(quantity("--parameters", flags.parameters, ELEMENTS, "123552"))
    at_least_1("--parameters", parameters)
    latency = 0.0 if flags.latency == "0" else quantity("--latency", flags.latency, SECONDS, "50us")
    bandwidth = quantity("--bandwidth", flags.bandwidth, BITS_PER_SECOND, "1gbit")
    per_image = flags.step_seconds_per_image
    seconds = quantity("--step-seconds-per-image", per_image, {"": 1, **SECONDS}, "0.001") if per_image else 0.0

    from distconv.benchmarks import predict as predictor

    if flags.measured:
        seconds = predictor.measured_seconds_per_image(flags.measured)
    network = predictor.Network(latency, bandwidth)
    wires = ("float32", "float16")
    rows = list(predictor.ladder(seconds, parameters, flags.batch_size, numbers, wires, network, flags.weak))
    if flags.json:
        print("\n".join(json.dumps(asdict(row)) for row in rows))
        return 0
    what = f"{flags.batch_size} images {'a rank' if flags.weak else 'in all'}"
    print(f"{parameters:,} parameters, {what}, {1e3 * seconds:.4g} ms an image on one rank; one rank a host,")
    print(f"latency {flags.latency}, bandwidth {flags.bandwidth} each way\n\n{predictor.FORMULA}\n")
    print(predictor.table(rows))
    if rows[-1].ranks < numbers[-1]:
        print(f"more ranks than images: {flags.batch_size} images do not give every rank one; see --weak")
    return 0


def check_png(path: Path | None) -> None:
    """Before anything is measured. Raises CannotCreateError."""
    if path and not path.parent.is_dir():
        raise CannotCreateError(f"--png {path}: there is no folder {path.parent}; make it first")


def draw(path: Path, picture: Callable[[], None]) -> None:
    """Raises CannotCreateError."""
    try:
        picture()
    except OSError as error:
        raise CannotCreateError(f"--png {path} cannot be written: {error.strerror}") from None


def one_blas_thread() -> None:
    """For this process, before NumPy is loaded, unless the user asks for more: one alone would take all cores."""
    if not any(os.environ.get(name) for name in BLAS_THREADS):
        os.environ["OMP_NUM_THREADS"] = "1"


# A benchmark more is a function more.
BENCHMARKS: dict[str, Callable[[Sequence[str]], int]] = {
    "step": step,
    "exchange": exchange,
    "scaling": scaling,
    "predict": predict,
}


if __name__ == "__main__":
    run_command(main)
