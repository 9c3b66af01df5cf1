"""`python -m distconv.prove`: does the number of ranks change what is computed? On this machine, with this MPI.

One rank computes the gradients of a few global batches alone, without any exchange. Then jobs of 1, 2, 4, ... ranks
compute the same, dropout and uneven shards included, each with each wire, and are held against it. A batch is cut into
the same shards for all, as batch norm takes its statistics from them. On the wires int16 and int32, which add shards up
exactly, all must end a training with the bits of the one rank.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distconv.benchmarks import rank_list
from distconv.comm.start import run_command, start
from distconv.command_line import Parser, check_file
from distconv.config import DEVICES, EXACT, MODELS, Config
from distconv.errors import UsageError
from distconv.formatting import plural
from distconv.supervise.launcher import end_on_sigterm, job_starter, refuse_to_nest, rows, run_job

if TYPE_CHECKING:
    from distconv.comm.world import World
    from distconv.kernels.interface import Array
    from distconv.run.run import Run

# The largest |gradient of P ranks - gradient of one rank| / |gradient of one rank| that a tensor may show. float16:
# two roundings of 2^-11, with room for tensors of few numbers. int8: small numbers beside large ones, as the biases of
# simpleconvnet (up to 0.54 with 16 seeds and sets of data; of deepconvnet 0.06). The others: roundings of the sums.
BOUNDS = {"float64": 1e-12, "float32": 3e-5, "float16": 1e-3, "int8": 0.8} | dict.fromkeys(EXACT, 0.0)
SHARDS = 8
SHOWN = 16  # hexadecimal digits of a SHA-256, to people
# Of the norm of the whole gradient: what differs in a smaller tensor is held against this instead of its own norm. The
# gradient of a bias before batch norm, say, is 0 but for rounding, and no two sums round alike.
SMALL = 1e-3
BATCHES = 3
SECONDS = 600.0  # a job may take


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[int], list[Config]]:
    """The flags, the numbers of ranks, and the settings of a run on each wire. Raises UsageError."""
    parser = Parser(
        prog="python -m distconv.prove",
        description="Show that N ranks compute what one rank computes: the largest relative difference of a gradient "
        "tensor, for each wire and number of ranks, against a stated bound, and whether all replicas hold the same "
        "bits after training. Starts mpirun by itself. Exit code 1 if a bound is broken.",
        epilog="examples:\n"
        "  python -m distconv.prove --png proof.png\n"
        "  python -m distconv.prove --ranks 1,3,7 --model simpleconvnet --data mnist --json\n"
        "  python -m distconv.prove --ranks 1,2,3,4,7 --wires int16 --shards 8     # the same SHA-256 on all\n"
        "  python -m distconv.prove --device cuda",
    )
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks, with commas (default: 1,2,4)")
    parser.add_argument("--wires", help="wires, with commas (default: all; float64 is for the CPU only)")
    parser.add_argument(
        "--shards", type=int, metavar="V", help=f"as in distconv.train (default: {SHARDS}, or the most ranks)"
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="as in distconv.train (default: cpu)")
    parser.add_argument(
        "--model", default="deepconvnet", help=f"as in distconv.train: {', '.join(MODELS)}, or your own"
    )
    parser.add_argument("--data", default="digits", help="as in distconv.train (default: digits)")
    parser.add_argument("--batch-size", type=int, default=37, help="of the whole job; 37 is shared out unevenly")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and dropout (default: 0)")
    parser.add_argument("--mpirun", metavar="COMMAND", help="what starts ranks, as 'srun --mpi=pmi2' (default: mpirun)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it there too")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)  # this is the job that writes the reference
    parser.add_argument("--compare", type=Path, help=argparse.SUPPRESS)  # this is a job that is held against it
    flags = parser.parse_args(argv)
    possible = [wire for wire in BOUNDS if flags.device == "cpu" or wire != "float64"]
    wires, numbers = flags.wires.split(",") if flags.wires else possible, rank_list(flags.ranks)
    if not set(wires) <= set(possible):
        raise UsageError(f"--wires {flags.wires}: expected some of {','.join(possible)}")
    ranks = plural(max(numbers), "rank")
    if flags.batch_size < max(numbers):
        raise UsageError(f"--batch-size {flags.batch_size} with {ranks}: give every rank an image or more")
    names = ("data", "model", "batch_size", "seed", "device")
    common = {name: getattr(flags, name) for name in names}
    shards = min(max(SHARDS, *numbers), flags.batch_size) if flags.shards is None else flags.shards
    if not max(numbers) <= shards <= flags.batch_size:
        raise UsageError(
            f"--shards {shards} with {ranks} and --batch-size {flags.batch_size}: a number from that of "
            "the ranks to that of the images was expected"
        )
    settings = [Config(epochs=1, eval_samples=1, wire=wire, shards=shards, **common) for wire in wires]
    return flags, numbers, settings


def main(argv: Sequence[str]) -> int:
    flags, numbers, settings = parse(argv)
    if flags.write or flags.compare:
        with start() as world:
            work(settings, flags.write or flags.compare, bool(flags.write), world)
        return 0

    check_file("--png", flags.png, ".png")
    refuse_to_nest("prove")
    starter = job_starter(flags.mpirun)
    end_on_sigterm()
    from distconv.run.log import RunLog

    table, note = Table(flags.json), RunLog(True).say_aside
    with tempfile.TemporaryDirectory() as folder:
        note("one rank alone computes what the others are held against")
        run_job(starter, 1, ["-m", "distconv.prove", *argv, "--write", folder], SECONDS)
        for P in numbers:
            note(plural(P, "rank"))
            for row in rows(
                run_job(starter, P, ["-m", "distconv.prove", *argv, "--compare", folder], SECONDS), starter
            ):
                table.show(row)
    if flags.png:
        from distconv.pictures.measurements import draw_proof
        from distconv.pictures.style import draw_png

        verdict = "is what one rank computes" if table.good else "is NOT what one rank computes"
        title = f"{flags.model} on {flags.data}, batch {flags.batch_size}\nwhat P ranks compute {verdict}"
        draw_png(flags.png, lambda: draw_proof(table.rows, title))
    return table.verdict()


def work(settings: list[Config], folder: Path, writes: bool, world: World) -> None:
    """One job: write the gradients of one rank, or print a row for each wire that tells how far these ranks' are."""
    import numpy as np

    from distconv.run.build import build_run
    from distconv.run.loading import load_dataset

    limit = BATCHES * settings[0].batch_size
    dataset, _ = load_dataset(settings[0].data, world, lambda line: None, limit_train=limit)
    for config in settings:
        run = build_run(config, dataset, world)
        # The wires of a type share it, but for those on which what one rank has, too, is rounded.
        reference = folder / f"{config.wire if config.is_exact else run.parameters.vector.dtype}.npy"
        if writes:
            np.save(reference, [shared_gradient(run, batch, alone=True) for batch in range(BATCHES)])
            if config.is_exact:
                reference.with_suffix(".json").write_text(json.dumps(trained(run)))
            continue
        differences = [
            largest_difference(run, shared_gradient(run, batch, alone=False), one_rank)
            for batch, one_rank in enumerate(np.load(reference))
        ]
        steps, sha256 = trained(run), run.parameters.digest()
        equal = len(set(world.comm.allgather(sha256))) == 1
        difference, bound = max(differences), BOUNDS[config.wire]
        row = {"wire": config.wire, "ranks": world.size, "max_relative_difference": difference, "bound": bound}
        row |= {"replicas_equal": equal, "ok": difference <= bound and equal}
        if config.is_exact:
            parting = first_difference(json.loads(reference.with_suffix(".json").read_text()), steps)
            row |= {"ok": row["ok"] and not parting, "shards": config.shards}
            row |= {"parameters_sha256": sha256, "differs_at": parting}
        if world.rank == 0:
            print(json.dumps(row), flush=True)


def trained(run: Run) -> list[dict[str, str]]:
    """Train to the end -> for each step, the SHA-256 of each tensor after it, by name."""
    from distconv.nn.parameters import digest
    from distconv.run.loop import StepRecord, train

    steps = []
    for record in train(run, lambda: False):
        if isinstance(record, StepRecord):
            named = run.parameters.named(run.parameters.vector)
            steps.append({name: digest({name: tensor}) for name, tensor in named.items()})
    return steps


def first_difference(wanted: Sequence[Mapping[str, str]], found: Sequence[Mapping[str, str]]) -> str:
    """The first step and tensor where two runs part, as `step 2, conv1.W`; nothing where they do not."""
    for step, (one, other) in enumerate(zip(wanted, found, strict=True), start=1):
        for name, sha256 in one.items():
            if other[name] != sha256:
                return f"step {step}, {name}"
    return ""


def shared_gradient(run: Run, batch: int, alone: bool) -> Array:
    """The gradient of a global batch at the run's initial weights: summed over the shares of the ranks.

    alone: this rank's own of the whole batch, without any exchange.
    """
    import numpy as np

    B = run.config.batch_size
    samples = np.arange(batch * B, (batch + 1) * B) % run.data.size("train")  # which may be fewer
    mine = samples if alone else samples[run.shards.part(B)]
    share = run.replica.share(batch, mine, B)
    return (share if alone and not run.config.is_exact else run.replica.sum_shares()).copy()


def largest_difference(run: Run, gradient: Array, reference: Array) -> float:
    """The largest |gradient - reference| / |reference| of a tensor; see SMALL."""
    import numpy as np

    least = SMALL * float(np.linalg.norm(reference)) or 1.0
    pairs = zip(run.parameters.named(gradient).values(), run.parameters.named(reference).values(), strict=True)
    return max(float(np.linalg.norm(g - r)) / max(least, float(np.linalg.norm(r))) for g, r in pairs)


class Table:
    """Shows rows to people or, as JSON, to programs, and remembers whether all were good."""

    def __init__(self, as_json: bool) -> None:
        self.as_json, self.good = as_json, True
        self.rows: list[Mapping[str, Any]] = []
        if not as_json:
            print(f"{'wire':<10}{'ranks':>5}{'largest difference':>21}{'bound':>9}{'replicas':>11}   verdict  SHA-256")

    def show(self, row: Mapping[str, Any]) -> None:
        self.good &= row["ok"]
        self.rows.append(row)
        if self.as_json:
            print(json.dumps(row), flush=True)
        else:
            replicas, verdict = ("equal" if row["replicas_equal"] else "DIFFER"), ("ok" if row["ok"] else "BROKEN")
            numbers = f"{row['ranks']:>5}{row['max_relative_difference']:>21.1e}{row['bound']:>9.0e}"
            sha256 = row.get("parameters_sha256", "")[:SHOWN]
            where = f"   differs at {row['differs_at']}" if row.get("differs_at") else ""
            print(f"{row['wire']:<10}{numbers}{replicas:>11}   {verdict:<6}   {sha256}{where}".rstrip(), flush=True)

    def verdict(self) -> int:
        if not self.as_json:
            print("the number of ranks does not change the run" if self.good else "a bound is broken: do not train so")
        return 0 if self.good else 1


if __name__ == "__main__":
    run_command(main)
