"""`python -m distconv.misclassified RUN --png FILE`: the first test images that a saved model gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distconv.comm.start import run_command, start
from distconv.command_line import Parser, add_model_arguments, check_file
from distconv.errors import UsageError

MOST = 200  # images of a page, which take some ten seconds to draw


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m distconv.misclassified",
        description="Draw the first test images that a saved model gets wrong, and print of each how sure the wrong "
        "inference is, its number in the test set and its (label, inference).",
        epilog="examples:\n"
        "  python -m distconv.misclassified runs/mine --png wrong.png\n"
        "  python -m distconv.misclassified runs/mine --hardest\n"
        "  python -m distconv.misclassified runs/mine/checkpoints/step-0000012000.safetensors --most 60",
    )
    add_model_arguments(parser, several=False)
    parser.add_argument("--hardest", action="store_true", help="those first whose wrong inference is the surest")
    parser.add_argument("--most", type=int, default=20, metavar="N", help="images at most (default: 20)")
    parser.add_argument(
        "--png", type=Path, default=Path("misclassified.png"), metavar="FILE", help="(default: misclassified.png)"
    )
    arguments = parser.parse_args(argv)
    check_file("--png", arguments.png, ".png")
    if not 1 <= arguments.most <= MOST:
        raise UsageError(f"--most {arguments.most}: expected a whole number from 1 to {MOST}")

    with start() as world:
        from distconv.pictures.answers import draw_mistakes
        from distconv.pictures.style import draw_on_one_rank
        from distconv.run.answers import judge, on_what, short_names
        from distconv.run.loading import open_models
        from distconv.run.log import RunLog

        world.watch.set_limits(0.0)
        log = RunLog(world.rank == 0)
        models, dataset = open_models(arguments, world, log.say_aside)
        ((_, _, answers),) = judge(models, dataset, ["float32"], world, log)
        wrong = answers.hardest() if arguments.hardest else answers.wrong()
        shown = wrong[: arguments.most]
        which = f"the {len(shown)} hardest" if arguments.hardest else f"the first {len(shown)}"
        rest = f"; {which}" * (len(shown) < len(wrong))
        title = f"{len(wrong):,} of {len(answers.labels):,} test images wrong{rest}"
        log.say(title)
        captions, names = [], short_names(dataset.class_names) or range(answers.classes)
        for i in shown:
            pair, sure = f"({names[answers.labels[i]]}, {names[answers.inferences[i]]})", answers.confidences[i]
            captions.append(f"{pair}\n{sure:.1%}, {i}")
            log.say(f"{sure:>7.2%}  image {i}: {pair}")
        accuracy = f"{on_what(models, dataset)}: test accuracy {answers.correct / len(answers.labels):.2%}"
        page = f"{accuracy}\n{title}"
        note = "(label, inference), confidence of the inference, number in the test set" if captions else ""
        images = dataset.test_images[shown]
        draw_on_one_rank(world, arguments.png, lambda: draw_mistakes(images, captions, page, note))
        log.say(f"drawn in {arguments.png}")
    return 0


if __name__ == "__main__":
    run_command(main)
