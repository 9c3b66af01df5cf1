"""`python -m distconv.evaluate RUN ...`: test accuracy of saved models and of their ensemble, and where they err."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distconv.comm.start import run_command, start
from distconv.command_line import Parser, add_model_arguments, check_file

if TYPE_CHECKING:
    from distconv.run.answers import Answers

PRECISIONS = ("float32", "float64", "float16")  # the quickest first, as somebody may be waiting
LONGEST_NAME = 50  # characters of a path that a picture has room for


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    with start() as world:
        from distconv.run.answers import describe, judge, on_what, short_names
        from distconv.run.loading import open_models, runs_of
        from distconv.run.log import RunLog

        world.watch.set_limits(0.0)
        log = RunLog(world.rank == 0)
        arguments.files = runs_of(arguments.files, world)
        several = len(arguments.files) > 1
        asked = arguments.precision or PRECISIONS[: 1 if several else None]
        precisions = [precision for precision in PRECISIONS if precision in asked]
        models, dataset = open_models(arguments, world, log.say_aside)
        total, last = len(dataset.test_labels), {}
        if not arguments.json:
            log.say(f"{'precision':<10} {'test accuracy':>13}   correct of {total:,}{'   model' * several}")
        for name, precision, answers in judge(models, dataset, precisions, world, log):
            log.say((as_json if arguments.json else as_row)(name if several else "", precision, answers))
            last[precision] = name, answers  # in the end those of the ensemble, if there is one
        name, answers = last[precisions[0]]
        right = f"{answers.correct / total:.2%} of {total:,} test images right in {precisions[0]}"
        class_names = dataset.class_names
        if not arguments.json:
            log.say("\n".join(["", f"{name}: {right}", "", *describe(answers, class_names)]))
        elif arguments.confusion:
            errors = {"confusion": answers.confusion().tolist(), "calibration_error": answers.calibration_error()}
            log.say(json.dumps({**errors, "class_names": class_names} if class_names else errors))
        if arguments.png:
            from distconv.pictures.answers import draw_confusion
            from distconv.pictures.style import draw_on_one_rank

            file = "" if several else name if len(name) <= LONGEST_NAME else f"...{name[-LONGEST_NAME:]}"
            title, names = f"{on_what(models, dataset)}\n{right}", short_names(class_names)
            draw_on_one_rank(world, arguments.png, lambda: draw_confusion(answers.confusion(), names, title, file))
            log.say_aside(f"drawn in {arguments.png}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m distconv.evaluate",
        description="Test accuracy of a saved model, of each class too, and what it takes for what. The parameters and "
        "the images are cast to each precision, and so is the output of each layer; sums within a layer are in float32 "
        "at least, as tensor cores make them. Of several models, the ensemble is judged besides, which averages their "
        "probabilities.",
        epilog="examples:\n"
        "  python -m distconv.evaluate runs/mine                        # its newest good checkpoint\n"
        "  python -m distconv.evaluate runs/mine --png confusion.png\n"
        "  mpirun -n 2 python -m distconv.evaluate runs/seed0 runs/seed1 runs/seed2\n"
        "  mpirun -n 2 python -m distconv.evaluate runs/ensemble        # all runs that --ensemble has trained there\n"
        "  mpirun -n 2 python -m distconv.evaluate params.pkl --data mnist --precision float16 --json\n\n"
        "--json gives the keys precision, test_accuracy, correct and total; of several models also model, which is\n"
        'RUN or, in the last line of a precision, "ensemble". --confusion adds a line with confusion, [[...], ...],\n'
        "calibration_error and, where the data has them, class_names.",
    )
    add_model_arguments(parser, several=True)
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        action="append",
        help="only this one; may be repeated (default: all three, but float32 alone for several models)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--confusion",
        action="store_true",
        help="with --json, a last line: how many images of each label (rows) got each inference (columns), and the "
        "expected calibration error; people see that anyway. In float32, or else the first precision that is computed",
    )
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="draw how many images of each label got each inference"
    )
    arguments = parser.parse_args(argv)
    check_file("--png", arguments.png, ".png")
    return arguments


def as_row(name: str, precision: str, answers: Answers) -> str:
    """A line of the table for people; the name of a model is empty where there is one alone."""
    total = len(answers.labels)
    correct = f"{answers.correct:,}".ljust(len(f"correct of {total:,}") + 3) + name
    return f"{precision:<10} {answers.correct / total:>13.2%}   {correct.rstrip()}"


def as_json(name: str, precision: str, answers: Answers) -> str:
    """The same for programs."""
    total, correct = len(answers.labels), answers.correct
    row = {"precision": precision, "test_accuracy": correct / total, "correct": correct, "total": total}
    return json.dumps({"model": name, **row} if name else row)


if __name__ == "__main__":
    run_command(main)
