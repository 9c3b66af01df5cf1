"""Time to an accuracy: the same training with several seeds, each a job of its own, scored on the whole test set.

Of a run with an average of the weights (--ema), the averaged model counts. Training time is that of the steps; total
time is from the start of mpirun, with all that it takes to start, to evaluate after each epoch, and to write files.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distconv.data.shard import batches
from distconv.errors import DistconvError
from distconv.nn.optimizers import EMA
from distconv.run.log import read_metrics
from distconv.supervise.launcher import run_job

SECONDS = 86_400.0  # that a job may take


@dataclass(frozen=True)
class Reached:
    """One run. accuracy: at the end, of 1; targets: of each that was reached, the seconds of training, and in all."""

    seed: int
    ranks: int
    accuracy: float
    training_seconds: float
    total_seconds: float
    targets: dict[float, tuple[float, float]]


def measure(
    starter: Sequence[str], ranks: int, train: Sequence[str], seeds: int, targets: Sequence[float],
    say: Callable[[str], None]
) -> Iterator[Reached]:  # fmt: skip
    """Train with the seeds from 0 on; train: flags of distconv.train. Raises DistconvError where a job fails."""
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            # A target that is missed would end the job with a failure.
            ours = f"--seed {seed} --eval-samples 0 --checkpoint-seconds 1e9 --target-accuracy 0 --out".split()
            began = time.time()
            run_job(starter, ranks, ["-m", "distconv.train", *train, *ours, str(out)], SECONDS)
            found = reached(read_metrics(out / "metrics.jsonl"), seed, began, targets)
        say(
            f"seed {seed}: {found.accuracy:.2%} after {found.training_seconds:.1f} s of training, "
            f"{found.total_seconds:.1f} s in all"
        )
        yield found


def reached(records: Sequence[Mapping[str, Any]], seed: int, began: float, targets: Sequence[float]) -> Reached:
    """What the records of a run say that began at a time. Raises DistconvError where they are not those of one."""
    training, total, accuracy, when = 0.0, 0.0, None, {}  # type: float, float, float | None, dict[float, Any]
    images, batch, ranks = 1, 1, 0
    for record in records:
        total = record["time"] - began
        if record["event"] == "start":
            images, batch, ranks = record["train_images"], record["batch_size"], record["ranks"]
        elif record["event"] == "step":
            first = (record["step"] - 1) % batches(images, batch) * batch
            training += min(batch, images - first) / record["images_per_second"]
        elif record["event"] in ("epoch", "final"):
            accuracy = record.get(f"{EMA}_test_accuracy", record.get("test_accuracy"))
            for target in targets:
                if accuracy is not None and accuracy >= target:
                    when.setdefault(target, (training, total))
    if accuracy is None:
        raise DistconvError("the run has no test accuracy: --task classify was expected")
    return Reached(seed, ranks, accuracy, training, total, when)


def table(runs: Sequence[Reached], targets: Sequence[float]) -> str:
    """For people: when each target was reached, and where the runs ended; means and standard deviations."""
    lines = [f"{'test accuracy':<14} {'reached':>8} {'seconds of training':>21} {'seconds in all':>18}"]
    for target in targets:
        times = [run.targets[target] for run in runs if target in run.targets]
        spread = [mean_and_deviation([pair[i] for pair in times]) if times else "-" for i in (0, 1)]
        lines.append(f"{target:<14.2%} {f'{len(times)} of {len(runs)}':>8} {spread[0]:>21} {spread[1]:>18}")
    seconds = [mean_and_deviation([getattr(run, f"{name}_seconds") for run in runs]) for name in ("training", "total")]
    end = mean_and_deviation([100 * run.accuracy for run in runs], digits=3)
    return "\n".join(
        [*lines, f"{'at the end':<14} {'':>8} {seconds[0]:>21} {seconds[1]:>18}", f"accuracy at the end: {end} %"]
    )


def mean_and_deviation(numbers: Sequence[float], digits: int = 1) -> str:
    """12.3 +- 0.4, the latter of the sample; without it for one number alone."""
    mean = f"{statistics.mean(numbers):.{digits}f}"
    return f"{mean} \N{PLUS-MINUS SIGN} {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else mean
