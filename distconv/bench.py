"""`python -m distconv.bench step|exchange|scaling|accuracy|predict`: what a machine gives. Flags -> call -> print."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict

from distconv.benchmarks.flags import (
    accuracy_flags,
    exchange_flags,
    predict_flags,
    scaling_flags,
    step_flags,
)
from distconv.comm.start import run_command, start
from distconv.comm.world import blas_threads
from distconv.command_line import Parser, check_file
from distconv.config import Config
from distconv.errors import UsageError
from distconv.formatting import plural
from distconv.settings import read_settings
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
        "  python -m distconv.bench accuracy --help          # seconds to an accuracy, over several seeds\n"
        "  python -m distconv.bench predict --help           # training on up to 4096 ranks of another machine",
    )
    parser.add_argument("benchmark", choices=tuple(BENCHMARKS), metavar="BENCHMARK", help=", ".join(BENCHMARKS))
    parser.parse_args(argv[:1])
    return 0


def step(argv: Sequence[str]) -> int:
    """Measures the ranks that it is started in."""
    flags = step_flags(argv)
    Config(model=flags.model)  # raises for a name that cannot be before anything is started

    with start() as world, contextlib.ExitStack() as rivals:
        from distconv.benchmarks import step as benchmark
        from distconv.benchmarks.gpu_step import GpuBench
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
            rival = rivals.enter_context(
                torch_step.rivals(world, flags.model, threads, device, flags.precision, compiled)
            )
        many = f"{plural(world.size, 'rank')} x {plural(threads, 'thread')}"
        title = f"{flags.model}, {many}, {device}" + f" in {flags.precision}" * (device == "cuda")
        if not flags.json:
            log.say(f"{title}: medians of {flags.repeats}\n{benchmark.HEAD}")
        results = []
        for batch_size in sizes:
            ours = world, flags.model, batch_size, flags.repeats
            bench = benchmark.CpuBench(*ours) if device == "cpu" else GpuBench(*ours, flags.precision, log.say_aside)
            dataset = benchmark.random_dataset(flags.model, batch_size, 0)
            engines = bench.engines + (rival(dataset, batch_size) if rival else [])
            rows: list[benchmark.Row] = []
            for phase in ("step", "evaluate") if flags.evaluate else ("step",):
                of_phase = benchmark.measure(world, engines, device, batch_size, threads, phase, flags.repeats)
                text = benchmark.table(of_phase)
                log.say("\n".join(json.dumps(asdict(row)) for row in of_phase) if flags.json else text)
                rows += of_phase  # said at once, as what follows may fail
            results.append(bench.look_inside(rows))
        if not flags.json:
            for _, text in results:
                log.say(f"\n{text}" + ", PyTorch's among them" * (rival is not None and device == "cpu"))
        if flags.png:
            from distconv.pictures.measurements import draw_step
            from distconv.pictures.style import draw_on_one_rank

            parts = [(size, part) for size, (part, _) in zip(sizes, results, strict=True)]
            draw_on_one_rank(world, flags.png, lambda: draw_step(parts, title))
    return 0


def exchange(argv: Sequence[str]) -> int:
    """Measures the ranks that it is started in."""
    flags = exchange_flags(argv)
    with start() as world:
        from distconv.benchmarks import exchange as benchmark
        from distconv.run.log import RunLog

        world.agree("the command line", repr(argv), "start all ranks alike")
        log, columns = RunLog(world.rank == 0), ""
        where = f"{world.size} ranks on {plural(world.hosts, 'host')}, {world.library}"
        rows: list[benchmark.Row] = []
        sizes = flags.elements or [*(n for n in benchmark.SIZES if n <= flags.largest), benchmark.MODEL]
        for of_one_size in benchmark.measure(world, sizes, flags.wires, flags.repeats, flags.seconds, log.say_aside):
            rows += of_one_size
            if flags.json:
                for row in of_one_size:
                    log.say(json.dumps(asdict(row)))
            else:
                if not columns:
                    log.say(f"{where}: median ms (and times MPI's float32)")
                if columns != (columns := benchmark.heading(of_one_size)):
                    log.say(columns)
                log.say(benchmark.line(of_one_size))
        if not flags.json:
            for carrier, how in {row.carrier: row.how for row in rows}.items():
                log.say(f"{carrier}: {how.removeprefix(carrier).removeprefix(', ')}")
            log.say(benchmark.advice(rows))
        if flags.png:
            from distconv.pictures.measurements import draw_exchange
            from distconv.pictures.style import draw_on_one_rank

            title = f"sum of gradients over {where}"
            draw_on_one_rank(world, flags.png, lambda: draw_exchange([asdict(row) for row in rows], title))
    return 0


def scaling(argv: Sequence[str]) -> int:
    """Starts jobs of itself, with --worker."""
    flags = scaling_flags(argv)

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

    check_file("--png", flags.png, ".png")
    refuse_to_nest("bench scaling")
    starter = job_starter(flags.mpirun)
    end_on_sigterm()
    settings(1)  # raises for a value that cannot be before anything is started
    from distconv.benchmarks.scaling import climb, table, with_goal
    from distconv.run.log import RunLog

    arguments = ["-m", "distconv.bench", "scaling", *argv, "--worker"]
    rungs = climb(starter, flags.numbers, batch_size, flags.wire, arguments, RunLog(True).say_aside)
    if flags.goal_steps:
        rungs = [with_goal(rung, flags.noise_scale, flags.goal_steps, flags.batch_size) for rung in rungs]
    what = (
        f"weak scaling, batch {flags.batch_size} a rank" if flags.weak else f"strong scaling, batch {flags.batch_size}"
    )
    title = f"{flags.model} on {flags.data}, {flags.wire} on the wire: {what}"
    print("\n".join(json.dumps(asdict(rung)) for rung in rungs) if flags.json else f"{title}\n{table(rungs)}")
    if flags.png:
        from distconv.pictures.measurements import draw_scaling
        from distconv.pictures.style import draw_png

        draw_png(flags.png, lambda: draw_scaling([asdict(rung) for rung in rungs], title))
    return int(len(rungs) < len(flags.numbers))


def accuracy(argv: Sequence[str]) -> int:
    """Starts jobs of distconv.train."""
    flags, train = accuracy_flags(argv)
    settings, print_only = read_settings(train)  # raises for a flag that cannot be before anything is started
    if print_only or settings.ensemble > 1:
        raise UsageError(
            "bench accuracy trains a run for each seed, and looks at its score: leave out --ensemble, --print-config "
            "and --describe"
        )
    refuse_to_nest("bench accuracy")
    starter = job_starter(flags.mpirun)
    end_on_sigterm()
    from distconv.benchmarks.accuracy import measure, table
    from distconv.run.log import RunLog

    runs = []
    for run in measure(starter, flags.ranks, train, flags.seeds, flags.targets, RunLog(True).say_aside):
        runs.append(run)
        if flags.json:
            print(json.dumps(asdict(run)), flush=True)
    if not flags.json:
        print(f"{shlex.join(train) or 'distconv.train'} on {plural(flags.ranks, 'rank')}")
        print(table(runs, flags.targets))
    return 0


def predict(argv: Sequence[str]) -> int:
    """Arithmetic: starts no MPI."""
    flags = predict_flags(argv)
    from distconv.benchmarks import predict as predictor

    seconds = flags.step_seconds_per_image
    if flags.measured:
        seconds = predictor.measured_seconds_per_image(flags.measured)
    network, wires = predictor.Network(flags.latency_seconds, flags.bits_per_second), ("float32", "float16")
    common = flags.batch_size, flags.numbers, wires, network, flags.weak
    rows = list(predictor.ladder(seconds, flags.parameters, *common))
    if not rows:
        raise UsageError(f"--batch-size {flags.batch_size}: so many images do not give every rank one, see --weak")
    formula = predictor.FORMULA
    if flags.goal_steps:
        rows = [predictor.with_goal(row, flags.noise_scale, flags.goal_steps, flags.batch_size) for row in rows]
        formula += f"\n{predictor.GOAL_FORMULA}"
    what = f"{flags.batch_size} images {'a rank' if flags.weak else 'in all'}"
    model = f"{flags.parameters:,} parameters, {what}, {1e3 * seconds:.4g} ms an image on one rank"
    machine = f"latency {flags.latency}, bandwidth {flags.bandwidth} each way"
    if flags.json:
        print("\n".join(json.dumps(asdict(row)) for row in rows))
    else:
        print(f"{model}; one rank a host,\n{machine}\n\n{formula}\n")
        print(predictor.table(rows))
        if rows[-1].ranks < flags.numbers[-1]:
            print(f"more ranks than images: {flags.batch_size} images do not give every rank one; see --weak")
    if flags.png:
        from distconv.pictures.measurements import draw_prediction
        from distconv.pictures.style import draw_png

        title = f"prediction: {model}\none rank a host, {machine}"
        draw_png(flags.png, lambda: draw_prediction([asdict(row) for row in rows], title))
    return 0


# A benchmark more is a function more.
BENCHMARKS: dict[str, Callable[[Sequence[str]], int]] = {
    "step": step,
    "exchange": exchange,
    "scaling": scaling,
    "accuracy": accuracy,
    "predict": predict,
}


if __name__ == "__main__":
    run_command(main)
