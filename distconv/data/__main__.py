"""`python -m distconv.data fetch mnist`: bring a data set here. `... show mnist`: draw what --augment makes of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from distconv.comm.start import run_command
from distconv.command_line import Parser, check_file
from distconv.errors import UsageError

SETS = ("mnist", "cifar10")
SIDE = 8  # of the grid that `show` draws


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m distconv.data",
        description="fetch: bring a data set to a node that has a network, and say where it lies. It is verified; what "
        "is there is not\nfetched again. It goes into DISTCONV_DATA_DIR if that is set, else into the user's cache.\n"
        "show: draw eight training images, and what --augment may make of each.",
        epilog="examples:\n"
        "  python -m distconv.data fetch mnist\n"
        "  DISTCONV_DATA_DIR=$SCRATCH/mnist python -m distconv.data fetch mnist    # and set it in the job, too\n"
        "  python -m distconv.data fetch cifar10\n"
        "  python -m distconv.data show digits --augment rotate=20,erase=0.3 --png digits.png",
    )
    parser.add_argument("action", choices=("fetch", "show"), metavar="fetch|show", help="what to do")
    parser.add_argument("name", metavar="NAME", help=f"to fetch: {', '.join(SETS)}; to show: as train's --data")
    parser.add_argument("--augment", default="mnist", help="as in distconv.train (default: mnist)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument(
        "--png", type=Path, default=Path("augmented.png"), metavar="FILE", help="(default: augmented.png)"
    )
    flags = parser.parse_args(argv)
    if flags.action == "show":
        check_file("--png", flags.png, ".png")
        return show(flags)
    if flags.name not in SETS:
        parser.error(f"argument NAME: invalid choice: '{flags.name}' (choose from {', '.join(SETS)})")

    from distconv.data import cifar, download, mnist

    cifar_folder = download.chosen_folder() or cifar.cache_folder()
    print(f"{flags.name} is in {cifar.fetch(cifar_folder) if flags.name == cifar.NAME else mnist.fetch()}")
    return 0


def show(flags: argparse.Namespace) -> int:
    import numpy as np

    from distconv import data
    from distconv.config import Config
    from distconv.data.augment import named_augmentation
    from distconv.data.dataset import Dataset
    from distconv.kernels.cpu.device import Cpu
    from distconv.nn.layers import Context
    from distconv.pictures.answers import draw_augmented
    from distconv.pictures.style import draw_png

    Config(seed=flags.seed)  # which knows what a seed may be
    name, note = data.prepare(flags.name)
    if note:
        print(note)
    dataset, change = data.load(name, print), named_augmentation(flags.augment)
    if not isinstance(dataset, Dataset):
        raise UsageError(f"{name} draws its own samples: nothing to show here")
    samples, rows = np.arange(min(SIDE, dataset.size("train"))), []
    for step in range(SIDE):
        context = Context(training=True, seed=flags.seed, step=step, samples=samples, kernels=Cpu()).within("augment")
        x, _ = dataset.batch("train", samples, context)
        rows.append(change(x, context) if step else x)
    title = f"{name} with --augment {flags.augment}\nleft: as the images are"
    draw_png(flags.png, lambda: draw_augmented(list(zip(*rows, strict=True)), title))
    print(f"drawn in {flags.png}")
    return 0


if __name__ == "__main__":
    run_command(main)
