"""`python -m distconv.evaluate CHECKPOINT|PARAMS.pkl`: test accuracy in three precisions."""

from __future__ import annotations

import json
from collections.abc import Sequence

from distconv.comm.start import run_command, start
from distconv.command_line import Parser, add_model_arguments

PRECISIONS = ("float64", "float32", "float16")


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m distconv.evaluate",
        description="Test accuracy of a saved model. The parameters and the images are cast to each precision, and so "
        "is the output of each layer; sums within a layer are in float32 at least, as tensor cores make them.",
        epilog="examples:\n"
        "  python -m distconv.evaluate runs/mine/checkpoints/step-0000012000.safetensors\n"
        "  mpirun -n 2 python -m distconv.evaluate params.pkl --data mnist --precision float16 --json",
    )
    add_model_arguments(parser)
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="only this one (default: all three)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args(argv)

    with start() as world:
        from distconv.kernels.cpu.device import Cpu
        from distconv.run import loading
        from distconv.run.log import RunLog
        from distconv.run.measure import measure
        from distconv.tasks.classify import Classification

        world.watch.set_limits(0.0)
        log = RunLog(world.rank == 0)
        model, parameters, dataset = loading.load_model(arguments, world, log.say_aside)
        total = len(dataset.test_labels)
        if not arguments.json:
            log.say(f"{'precision':<10} {'test accuracy':>13}   correct of {total:,}")
        for precision in arguments.precision or PRECISIONS:
            rounded = loading.cast(parameters, precision)
            kernels = Cpu(precision)
            correct = int(measure(Classification(), dataset, "test", model, rounded.values, kernels, world)[0])
            result = {"precision": precision, "test_accuracy": correct / total, "correct": correct, "total": total}
            log.say(json.dumps(result) if arguments.json else f"{precision:<10} {correct / total:>13.2%}   {correct:,}")
    return 0


if __name__ == "__main__":
    run_command(main)
