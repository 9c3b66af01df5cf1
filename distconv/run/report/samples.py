"""What a report shows of the data: answers to the test images, the hardest of these, and images changed at random.

They are written at the end of a run, so that a report needs neither the model nor the data set.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distconv.data.augment import Augmented
from distconv.data.dataset import Dataset, Images
from distconv.kernels.cpu.device import Cpu
from distconv.nn.layers import Context
from distconv.run.answers import Answers, gather, softmax
from distconv.run.files import write_whole
from distconv.run.run import Run
from distconv.run.scores import scores
from distconv.tasks.classify import Classification

ANSWERS = "answers.npz"
HARDEST = 20  # images that are kept
VARIANTS = 5  # of an image that training changes at random, the unchanged one first
LARGEST_SIDE = 96  # pixels of an image that is kept; of a larger one every other, third, ... pixel
VERSION = 1


@dataclass(frozen=True)
class Samples:
    """answers: to all test samples; hardest (M,): their numbers, and hardest_images (M, H, W, C).

    augmented (A, VARIANTS, H, W, C): training images, each unchanged and then as training may see it; A may be 0. All
    images are uint8. class_names: of each class, or none.
    """

    answers: Answers
    hardest: NDArray[np.int64]
    hardest_images: Images
    augmented: Images
    class_names: Sequence[str]


def answer(run: Run) -> Answers | None:
    """The answers of a run's model, averaged weights where there are such, to the test set; collective.

    None for what does not classify the images of a Dataset, as a user's own task or data.
    """
    data = run.data.data if isinstance(run.data, Augmented) else run.data
    if type(run.task) is not Classification or not isinstance(data, Dataset) or not data.size("test"):
        return None
    replica = run.replica
    given = scores(data, replica.model, replica.averages, replica.kernels, run.world)
    return gather(given, softmax(given), data.test_labels, run.world)


def save_samples(path: Path, run: Run, answers: Answers) -> None:
    """Write them, whole or not at all. Raises StorageError."""
    augmented = isinstance(run.data, Augmented)
    data: Dataset = run.data.data if augmented else run.data  # type: ignore[attr-defined, assignment]
    hardest = answers.hardest()[:HARDEST]
    arrays = {
        "version": np.array(VERSION),
        "classes": np.array(answers.classes),
        "labels": answers.labels,
        "inferences": answers.inferences,
        "confidences": answers.confidences.astype(np.float32),
        "hardest": hardest,
        "hardest_images": _as_bytes(data.test_images[hardest]),
        "augmented": _variants(run) if augmented else np.zeros((0, VARIANTS, 1, 1, 1), np.uint8),
        "class_names": np.array(data.class_names or [], str),
    }
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    write_whole(path, content.getvalue())


def load_samples(path: Path) -> Samples | None:
    """None where there is no such file, or it is not what was written. Runs no code of the file."""
    with contextlib.suppress(Exception):  # a damaged file raises anything
        file = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        found = {name: file[name] for name in file.files}
        N, classes = len(found["labels"]), int(found["classes"])
        labels, inferences = (found[name].astype(np.int64).reshape(N) for name in ("labels", "inferences"))
        if not all(((those >= 0) & (those < classes)).all() for those in (labels, inferences)):
            return None
        answers = Answers(classes, labels, inferences, found["confidences"].astype(np.float64).reshape(N))
        images, augmented = found["hardest_images"], found["augmented"]
        hardest = found["hardest"].astype(np.int64).reshape(len(images))
        is_whole = images.dtype == augmented.dtype == np.uint8 and images.ndim == 4 and augmented.ndim == 5
        if found["version"] == VERSION and is_whole and (not len(hardest) or 0 <= hardest.min() <= hardest.max() < N):
            return Samples(answers, hardest, images, augmented, found["class_names"].tolist())
    return None


def _variants(run: Run) -> Images:
    """Some training images, each unchanged and as the first steps of training change it."""
    samples, rows = np.arange(min(4, run.data.size("train"))), []
    for step in range(VARIANTS):
        context = Context(training=step > 0, seed=run.config.seed, step=step, samples=samples, kernels=Cpu())
        x: Any = run.data.batch("train", samples, context)[0]
        rows.append(np.asarray(x))
    return _as_bytes(np.stack(rows, axis=1))


def _as_bytes(images: Any) -> Images:
    """Images (..., H, W, C) as uint8 (..., H, W, 1 or 3), floats stretched over their range, large ones made small."""
    every = max(1, -(-max(images.shape[-3:-1], default=1) // LARGEST_SIDE))
    images = images[..., ::every, ::every, :]
    images = images[..., :3] if images.shape[-1] >= 3 else images[..., :1]
    if images.dtype == np.uint8 or not images.size:
        return np.asarray(images, np.uint8)
    low, high = min(0.0, float(images.min())), max(1.0, float(images.max()))
    return np.asarray(np.round((images - low) * (255 / (high - low))), np.uint8)
