"""`python -m distconv.misclassified CHECKPOINT --png FILE`: the first test images that a saved model gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distconv.comm.start import run_command, start
from distconv.command_line import Parser, add_model_arguments
from distconv.errors import CannotCreateError

SHOWN = 20  # a grid of 4 x 5


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m distconv.misclassified",
        description="Draw the first 20 test images that a saved model gets wrong, each with its (label, inference), "
        "and print the pairs.",
        epilog="example:\n"
        "  python -m distconv.misclassified runs/mine/checkpoints/step-0000012000.safetensors --png wrong.png",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--png", type=Path, default=Path("misclassified.png"), metavar="FILE", help="(default: misclassified.png)"
    )
    arguments = parser.parse_args(argv)

    with start() as world:
        import numpy as np

        from distconv.run import loading
        from distconv.run.log import RunLog
        from distconv.run.measure import predictions
        from distconv.run.plots import draw_mistakes

        world.watch.set_limits(0.0)
        log = RunLog(world.rank == 0)
        model, parameters, dataset = loading.load_model(arguments, world, log.say_aside)
        inferences = predictions(dataset, model, loading.cast(parameters, np.float32).values, world)
        wrong = np.flatnonzero(inferences != dataset.test_labels)
        shown = wrong[:SHOWN]
        pairs = [(int(dataset.test_labels[i]), int(inferences[i])) for i in shown]
        title = f"{len(wrong):,} of {len(inferences):,} test images wrong; the first {len(shown)}: (label, inference)"
        log.say(title)
        for i, pair in zip(shown, pairs, strict=True):
            log.say(f"image {i}: {pair}")
        with world.together():
            if world.rank == 0:
                try:
                    draw_mistakes(dataset.test_images[shown], pairs, title, arguments.png)
                except OSError as error:
                    raise CannotCreateError(f"--png {arguments.png} cannot be written: {error.strerror}") from None
        log.say(f"drawn in {arguments.png}")
    return 0


if __name__ == "__main__":
    run_command(main)
