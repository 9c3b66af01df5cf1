"""A data set and a saved model, the same on all ranks: what the commands read before they work."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from distconv import data
from distconv.comm.world import World
from distconv.config import CLASSIFY
from distconv.data.data import Data
from distconv.data.dataset import Dataset
from distconv.errors import MismatchError, UsageError
from distconv.kernels.compiled import CACHE
from distconv.nn.layers import Layer
from distconv.nn.networks import build_network
from distconv.nn.parameters import Parameters
from distconv.run.checkpoint import Checkpoint, load_checkpoint
from distconv.run.pickled import from_source, read_pickle
from distconv.run.same_code import agree_on_code

CHECKPOINT_ENDING = ".safetensors"


def load_dataset(
    name: str, world: World, say: Callable[[str], None], limit_train: int = 0, validation: int = 0
) -> tuple[Data, str]:
    """The data set of that name, fetched by one process of a host if need be, and the name it turned out to have.

    say prints a line for the user. validation: so many training samples are held out first; limit_train: of those that
    are left, only the first so many are used; 0 leaves all. Raises DistconvError on all ranks alike.
    """
    note = ""
    world.at("download")
    with world.together():
        if world.rank == 0:
            name, note = data.prepare(name)
    name, note = world.comm.bcast((name, note))
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
    world.agree("the data set", dataset.digest, "give all hosts the same files")
    return dataset, name


def load_model(
    arguments: argparse.Namespace, world: World, say: Callable[[str], None]
) -> tuple[Layer, Parameters, Dataset]:
    """Model, parameters in float64 and data set, on every rank. Raises DistconvError on all of them alike."""
    CACHE.say = say
    with world.together():
        checkpoint = load_checkpoint(arguments.file) if arguments.file.suffix == CHECKPOINT_ENDING else None
        arrays = {} if checkpoint else read_pickle(arguments.file)
    if checkpoint and not arguments.data:  # must be what the model was trained on
        parts = {part: checkpoint.config.get(part, 0) for part in ("limit_train", "validation")}
        dataset, data_name = load_dataset(checkpoint.data["name"], world, say, **parts)
    else:
        dataset, data_name = load_dataset(arguments.data or data.AUTO, world, say)
    with world.together():
        if not isinstance(dataset, Dataset) or (checkpoint and checkpoint.config.get("task", CLASSIFY) != CLASSIFY):
            raise UsageError(f"{arguments.file} has not learned to classify images of a Dataset: nothing to show here")
        if checkpoint:
            check_data(checkpoint, dataset, data_name, chosen=bool(arguments.data))
        name = arguments.model or (checkpoint.config["model"] if checkpoint else "deepconvnet")
        model, specs = build_network(name, dataset.image_shape, dataset.classes, (dataset.classes,))
        parameters = Parameters(specs, np.float64)
        if checkpoint:
            checkpoint.fill(parameters.by_slot({"value": parameters.vector}))
        else:
            from_source(arrays, model, dataset.image_shape, parameters, arguments.file)
    agree_on_code(world, name, data_name)
    return model, parameters, dataset


def check_data(checkpoint: Checkpoint, dataset: Dataset, name: str, chosen: bool) -> None:
    """Raise MismatchError for a data set that the model cannot judge, or that nobody has chosen for it.

    chosen: the user has named this one. Else it is what the checkpoint names, and must be what it was trained on still.
    """
    was = checkpoint.data
    wanted = f"{was['classes']} classes of images of {tuple(was['image_shape'])}"
    found = f"{dataset.classes} classes of images of {dataset.image_shape}"
    if wanted != found:
        raise MismatchError(
            f"{checkpoint.path} was trained on {wanted}, but {name} has {found}: name another data set by --data"
        )
    if not chosen and dataset.digest != was["digest"]:
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
