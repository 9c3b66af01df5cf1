"""`python -m distconv.export RUN FILE.npz`: a model's weights by the source's names, in a file of NumPy."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distconv.comm.start import run_command, start
from distconv.command_line import Parser, add_weights_argument
from distconv.errors import CannotCreateError, UsageError

if TYPE_CHECKING:
    from distconv.run.loading import SavedFile

ENDING = ".npz"


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m distconv.export",
        description="Write the weights of a saved model into an .npz file, as the textbook names and lays them out:\n"
        "W1 (F, C, K, K), b1 (F,), ...; of an affine layer W (inputs, outputs), after an image in (C, H, W) order.\n"
        "A network that these cannot tell, as it has batch norm or branches, keeps this project's own names and\n"
        "layouts: convnorm1.W (K, K, C, F), images as (H, W, C). So does what is not trained, such as running means.\n"
        "Numbers are float32, or float64 where the file that is read has those (of a run with --wire float64, or of\n"
        "the textbook), so that no bit is lost. The arrays of a pickle or an .npz are written as they are.\n"
        "FILE is written whole or not at all, and over one that is there.",
        epilog="examples:\n"
        "  python -m distconv.export runs/mine params.npz\n"
        "  python -m distconv.export params.pkl params.npz\n"
        "  python -c \"import numpy; print({n: a.shape for n, a in numpy.load('params.npz').items()})\"\n"
        "  python -m distconv.evaluate params.npz --data mnist      # and train --init params.npz",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, a checkpoint, a pickle or an .npz")
    parser.add_argument("file", type=Path, metavar="FILE.npz", help="the file to write")
    add_weights_argument(parser)
    arguments = parser.parse_args(argv)
    if arguments.file.suffix != ENDING:
        raise UsageError(f"{arguments.file}: a name that ends in {ENDING} was expected for the file to write")

    with start() as world:
        from distconv.run.loading import newest_of, open_file, tell_average
        from distconv.run.log import RunLog

        log = RunLog(world.rank == 0)
        with world.together():
            if world.rank == 0:
                file = open_file(newest_of(arguments.run, log.say_aside), None, arguments.weights)
                tell_average(arguments.run, file, log.say_aside)
                arrays, passed_over = arrays_of(file)
                if passed_over:
                    log.say_aside(f"{arguments.run}: passed over {passed_over}, as no arrays of finite floats")
                write(arguments.file, arrays)
                log.say(summary(arguments.file, arrays))
    return 0


def arrays_of(file: SavedFile) -> tuple[Mapping[str, Any], str]:
    """A saved model's arrays by their names in the file to write, and what of a pickle or .npz is left out, as text.

    Raises BadDataError where nothing is left, UsageError where the model cannot be built, MismatchError, StorageError.
    """
    import numpy as np

    from distconv.errors import BadDataError
    from distconv.nn.networks import build_network
    from distconv.nn.parameters import Parameters
    from distconv.run.layout import listed, places, to_file

    if file.checkpoint is None:
        arrays = {name: array for name, array in file.arrays.items() if array is not None and np.isfinite(array).all()}
        if not arrays:
            raise BadDataError(f"{file.path} holds no arrays of finite floats: nothing was written")
        left = [name for name in file.arrays if name not in arrays]
        return arrays, listed(left) if left else ""
    data = file.checkpoint.data
    shape = tuple(data["image_shape"])
    model, specs = build_network(file.network, shape, data["classes"], None)
    parameters = Parameters(specs, max(file.checkpoint.tensors.dtypes.values()))
    file.fill(parameters, model, shape)
    return to_file(parameters, places(model, parameters, shape)), ""


def write(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an .npz file, whole or not at all; the same arrays give the same bytes. Raises CannotCreateError."""
    from numpy.lib import format as npy

    from distconv.run.files import replacing

    try:
        # numpy.savez would write the time, and takes not every name.
        with replacing(path, f".{os.getpid()}") as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name, array in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                    npy.write_array(file, array, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CannotCreateError(f"{path} cannot be written: {getattr(error, 'strerror', '') or error}") from None


def summary(path: Path, arrays: Mapping[str, Any]) -> str:
    """What was written, for people."""
    names = list(arrays)
    first, last = (f"{name} {arrays[name].shape}" for name in (names[0], names[-1]))
    kinds = ", ".join(sorted({str(array.dtype) for array in arrays.values()}))
    return f"{path}: {len(arrays)} arrays in {kinds}, {first} to {last}"


if __name__ == "__main__":
    run_command(main)
