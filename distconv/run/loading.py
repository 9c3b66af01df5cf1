"""A data set and saved models, the same on all ranks: what the commands read before they work."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from distconv import data
from distconv.comm.world import World
from distconv.config import CLASSIFY
from distconv.data.data import Data
from distconv.data.dataset import Dataset
from distconv.errors import MismatchError, MissingInputError, StorageError, UsageError
from distconv.kernels.compiled import CACHE
from distconv.nn.layers import Layer
from distconv.nn.networks import build_network
from distconv.nn.optimizers import EMA
from distconv.nn.parameters import Parameters, Shape, Specs
from distconv.run.array_files import empty_folder, read_arrays, require_file
from distconv.run.checkpoint import Checkpoint, load_checkpoint, newest_good
from distconv.run.folder import members
from distconv.run.layout import FileArrays, check, fill, listed, places
from distconv.run.same_code import agree_on_code
from distconv.tasks.classify import Classification

CHECKPOINT_ENDING = ".safetensors"


def load_dataset(
    name: str, world: World, say: Callable[[str], None], limit_train: int = 0, validation: int = 0
) -> tuple[Data, str]:
    """The data set of that name, fetched by one process of a host if need be, and the name it turned out to have.

    say prints a line for the user. validation: so many training samples are held out first; limit_train: of those that
    are left, only the first so many are used; 0 leaves all. Raises DistconvError on all ranks alike.
    """
    asked = name
    world.at("download")
    name, note = world.on_rank_0(lambda: data.prepare(asked))
    if note:
        say(note)
    with world.together():
        if world.local_rank == 0 and world.rank != 0:
            data.prepare(name)
    world.at("data")
    with world.together():
        dataset = data.load(name, say)
        if (validation or limit_train) and not isinstance(dataset, Dataset):
            raise UsageError(f"--data {name} draws its own samples: leave out --validation and --limit-train")
        if validation:
            dataset = dataset.split_validation(validation)  # type: ignore[attr-defined]
        if limit_train:
            dataset = dataset.limited(limit_train)  # type: ignore[attr-defined]
    seeded = "draw from a seed, so that all make the same arrays"
    advice = seeded if data.is_function(name) else "give all hosts the same files"
    world.agree("the data set", dataset.digest, advice)
    return dataset, name


@contextlib.contextmanager
def named_by_a_run(path: str) -> Iterator[None]:
    """Within it, a path that a run was given is read. Where it leads nowhere, say from where it counts."""
    try:
        yield
    except MissingInputError as error:
        if path not in data.NAMES and not os.path.isabs(path):  # noqa: PTH117
            error.args = (f"{error}; the run names it from the folder where it was started: start this there, too",)
        raise


@dataclass(frozen=True)
class SavedFile:
    """A checkpoint, or the arrays of a pickle or .npz. network: the name of its model; slot: of its weights."""

    path: Path
    network: str
    slot: str
    checkpoint: Checkpoint | None
    arrays: FileArrays

    def check(self, model: Layer, parameters: Parameters, input_shape: Shape) -> list[str]:
        """See layout.check; what a checkpoint holds is found out when it is read."""
        return [] if self.checkpoint else check(self.arrays, places(model, parameters, input_shape), self.path)

    def fill(self, parameters: Parameters, model: Layer, input_shape: Shape) -> None:
        """Read the weights into a model's vector; what an array file lacks keeps its values.

        Raises MismatchError where the file holds those of another model, or too large ones for the dtype; StorageError.
        """
        if self.checkpoint:
            self.checkpoint.fill(parameters.by_slot({self.slot: parameters.vector}))
        else:
            fill(parameters, self.arrays, places(model, parameters, input_shape), self.path)


@dataclass(frozen=True)
class SavedModel:
    """A model whose weights are still in its file. name: what the user called it."""

    name: str
    file: SavedFile
    model: Layer
    specs: Specs
    image_shape: Shape

    def load(self, dataset: Data) -> Parameters:
        """Its weights in float64. Raises MismatchError where the file holds those of another model, StorageError.

        dataset: what it judges, whose mean and deviation stand in for those of its training set, if the file has none.
        """
        parameters = Parameters(self.specs, np.float64)
        if not self.file.checkpoint:
            parameters.initialize(0, dataset)
        self.file.fill(parameters, self.model, self.image_shape)
        return parameters


def open_models(
    arguments: argparse.Namespace, world: World, say: Callable[[str], None]
) -> tuple[Sequence[SavedModel], Dataset]:
    """The models that a command was given, and the data set that all of them can judge, on every rank.

    say prints a line for the user: of a folder, which checkpoint was taken, and where the weights are averages. All is
    checked but what SavedModel.load finds. Raises DistconvError on all ranks alike.
    """
    CACHE.say = say
    # Rank 0 alone looks into folders, as a run may be writing its next checkpoint.
    found = world.on_rank_0(lambda: [newest_of(path, say) for path in arguments.files])
    with world.together():
        files = [open_file(path, arguments.model, arguments.weights) for path in found]
    for given, file in zip(arguments.files, files, strict=True):
        tell_average(given, file, say)
    checkpoints = [file.checkpoint for file in files if file.checkpoint]
    if checkpoints and not arguments.data:  # must be what the models were trained on
        name, trained = checkpoints[0].data["name"], checkpoints[0].config
        with named_by_a_run(name):
            dataset, data_name = load_dataset(name, world, say, trained.limit_train, trained.validation)
    else:
        dataset, data_name = load_dataset(arguments.data or data.AUTO, world, say)
    with world.together():
        others = [file for file in files if file.checkpoint and file.checkpoint.config.task != CLASSIFY]
        if others or not isinstance(dataset, Dataset):
            path = (others or files)[0].path
            raise UsageError(f"{path} has not learned to classify images of a Dataset: nothing to show here")
        for checkpoint in checkpoints:
            check_data(checkpoint, dataset, data_name, bool(arguments.data), checkpoints[0])
        shapes = dataset.image_shape, dataset.classes, Classification().output_shape(dataset)
        models = [
            SavedModel(str(given), file, *build_network(file.network, *shapes), dataset.image_shape)
            for given, file in zip(arguments.files, files, strict=True)
        ]
        passed_over = [saved.file.check(saved.model, Parameters(saved.specs), saved.image_shape) for saved in models]
    for saved, names in zip(models, passed_over, strict=True):
        tell_passed_over(saved.name, names, say)
    agree_on_code(world, data_name, *dict.fromkeys(file.network for file in files))
    return models, dataset


def runs_of(paths: Sequence[Path], world: World) -> Sequence[Path]:
    """The paths, where the folder of an ensemble stands for the runs in it; collective."""
    return world.on_rank_0(lambda: [run for path in paths for run in members(path)])


def tell_passed_over(path: str, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Say what of a file is not taken."""
    if names:
        say(f"{path}: passed over {listed(names)}, for which the model has no place")


def newest_of(path: Path, say: Callable[[str], None]) -> Path:
    """Of a run's folder the newest good checkpoint; any other path as it is.

    Raises MissingInputError, BadDataError, StorageError.
    """
    if not os.path.isdir(path):  # noqa: PTH112 (pathlib raises where a name is too long, or a folder may not be entered)
        return path
    try:
        checkpoint, passed_over = newest_good(path / "checkpoints")
        if checkpoint is None:
            raise empty_folder(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from None
    for why in passed_over:
        say(why)
    say(f"{path}: step {checkpoint.position['step']:,}, {checkpoint.path.name}")
    return checkpoint.path


def open_file(path: Path, network: str | None, weights: str | None = None) -> SavedFile:
    """Read the file of a saved model.

    network: the name of the model, where the file does not tell it. weights: raw, averaged, or None for the average if
    there is one. Raises UsageError where there is no average, and what reading raises.
    """
    require_file(path)
    checkpoint = load_checkpoint(path) if path.suffix == CHECKPOINT_ENDING else None
    arrays = {} if checkpoint else read_arrays(path)
    has_average = bool(checkpoint and checkpoint.config.ema)
    if weights == "averaged" and not has_average:
        raise UsageError(
            f"{path} holds no average of the weights, which --weights averaged asks for: a run with --ema keeps one; "
            "leave --weights out"
        )
    name = network or (checkpoint.config.model if checkpoint else "deepconvnet")
    return SavedFile(path, name, EMA if has_average and weights != "raw" else "value", checkpoint, arrays)


def tell_average(given: Path, file: SavedFile, say: Callable[[str], None]) -> None:
    """Say where weights are averages, as they are by default."""
    if file.slot == EMA:
        say(f"{given}: the average of the weights (--weights raw takes those of the last step)")


def check_data(checkpoint: Checkpoint, dataset: Data, name: str, chosen: bool, first: Checkpoint) -> None:
    """Raise MismatchError for a data set that the model cannot judge, or that nobody has chosen for it.

    chosen: the user has named this one. Else it is what the first checkpoint names, and must be what this one was
    trained on still.
    """
    was = checkpoint.data
    wanted = f"{was['classes']} classes of images of {tuple(was['image_shape'])}"
    found = f"{dataset.classes} classes of images of {dataset.image_shape}"
    if wanted != found:
        raise MismatchError(
            f"{checkpoint.path} was trained on {wanted}, but {name} has {found}: name another data set by --data"
        )
    if chosen or dataset.digest == was["digest"]:
        return
    if was["digest"] != first.data["digest"]:
        raise MismatchError(
            f"{checkpoint.path} was trained on the data set {was['name']} of SHA-256 {was['digest'][:12]}..., but "
            f"{first.path} on {first.data['name']} of {first.data['digest'][:12]}...: name one for all by --data"
        )
    raise MismatchError(
        f"{checkpoint.path} was trained on the data set {name} of SHA-256 {was['digest'][:12]}..., which is now "
        f"{dataset.digest[:12]}...: bring the old one back, or say --data {name} to take the new one"
    )


def cast(parameters: Parameters, dtype: DTypeLike) -> Parameters:
    """The same model with its parameters rounded to a dtype; itself where that is theirs."""
    if parameters.vector.dtype == dtype:
        return parameters
    other = Parameters(parameters.specs, dtype)
    other.vector[...] = parameters.vector
    return other
