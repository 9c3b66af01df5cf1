"""How long a GPU trains until it knows MNIST: `python -m tests.time_to_accuracy`.

For each of ten seeds, the seconds from the first step to the end of the epoch after which 99 % of all test images are
classified right, evaluations on 10,000 images of each set included; starting, compiling and loading the data are not.
"""

from __future__ import annotations

import statistics
import time

from distconv.comm.start import start
from distconv.config import Config
from distconv.data import load
from distconv.run.build import build_run
from distconv.run.loop import EpochRecord, train

SEEDS, TARGET = range(10), 0.99


def main() -> None:
    with start() as world:
        dataset = load("mnist")
        found = []
        for seed in SEEDS:
            settings = Config(device="cuda", precision="tf32", epochs=10, eval_samples=10_000, seed=seed)
            run = build_run(settings, dataset, world)
            began = time.perf_counter()
            for record in train(run, lambda: False, ahead=True):
                if isinstance(record, EpochRecord) and (accuracy := record.scores["test"]) >= TARGET:
                    found.append(time.perf_counter() - began)
                    print(f"seed {seed}: {accuracy:.2%} after {record.epoch} epochs, {found[-1]:.2f} s")
                    break
        print(f"{TARGET:.0%} in {len(found)} of {len(SEEDS)} runs, median {statistics.median(found):.2f} s of training")


if __name__ == "__main__":
    main()
