"""What models answer to the test images, how sure they are, and where they err: numbers, and text for people."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distconv.comm.world import World
from distconv.data.dataset import Dataset, Labels
from distconv.errors import UsageError
from distconv.kernels.cpu.device import Cpu
from distconv.kernels.interface import Array
from distconv.run.loading import SavedModel, cast
from distconv.run.log import RunLog
from distconv.run.scores import scores

ENSEMBLE = "ensemble"  # its name among those of the models
BINS = 15  # of confidence, as many as Guo et al. have (2017, arXiv 1706.04599)
MOST_CLASSES = 20  # whose matrix fits on a terminal
MOST_IN_A_MATRIX = 10_000  # 800 MB
WORST = 10  # classes, and confusions, that are shown of more
LONGEST_NAME = 20  # characters of a class's name that tables and pictures have room for


@dataclass(frozen=True)
class Answers:
    """To N samples of so many classes: labels, inferences and confidences (the probability of the inference), (N,)."""

    classes: int
    labels: NDArray[np.int64]
    inferences: NDArray[np.int64]
    confidences: NDArray[np.float64]

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each inference is the label."""
        right: NDArray[np.bool_] = self.inferences == self.labels
        return right

    @property
    def correct(self) -> int:
        return int(np.count_nonzero(self.right))

    def wrong(self) -> NDArray[np.int64]:
        """The samples that were answered wrong, in their order."""
        return np.flatnonzero(~self.right)

    def hardest(self) -> NDArray[np.int64]:
        """The same: first the one whose wrong answer was the surest."""
        wrong = self.wrong()
        return wrong[np.argsort(-self.confidences[wrong], kind="stable")]

    def confusion(self) -> NDArray[np.int64]:
        """How many samples of each label, a row, got each inference, a column -> (classes, classes).

        Raises UsageError, on all ranks that call it, for more classes than memory has room for.
        """
        if self.classes > MOST_IN_A_MATRIX:
            raise UsageError(
                f"{self.classes:,} classes: a matrix of up to {MOST_IN_A_MATRIX:,} can be had; leave out --confusion "
                "and --png"
            ).on_all_ranks()
        pairs = self.labels * self.classes + self.inferences
        return np.bincount(pairs, minlength=self.classes**2).reshape(self.classes, self.classes)

    def confusions(self) -> list[tuple[int, int, int]]:
        """(label, inference, times) of what was taken for something else most often, WORST at most."""
        wrong = np.stack([self.labels, self.inferences])[:, self.wrong()]
        pairs, times = np.unique(wrong, axis=1, return_counts=True)
        most = np.argsort(-times, kind="stable")[:WORST]
        return list(zip(*pairs[:, most].tolist(), times[most].tolist(), strict=True))

    def calibration_error(self) -> float:
        """The expected one: how far confidence is from accuracy in each bin, weighted by the samples in it."""
        bins = np.clip(np.ceil(self.confidences * BINS).astype(np.int64) - 1, 0, BINS - 1)
        gaps = np.bincount(bins, weights=self.right - self.confidences, minlength=BINS)
        return float(np.abs(gaps).sum() / len(self.labels))


def judge(
    models: Sequence[SavedModel], dataset: Dataset, precisions: Sequence[str], world: World, log: RunLog
) -> Iterator[tuple[str, str, Answers]]:
    """(name, precision, answers) of each model in each precision and then, of several models, of their ensemble.

    The ensemble's probabilities are the means of theirs. Collective; one model is in memory at a time, and of the
    probabilities those of this rank's share. log: shows how far this rank is. Raises what SavedModel.load does, on all
    ranks.
    """
    sums: dict[str, NDArray[np.float64]] = {}
    for saved in models:
        with world.together():
            parameters = saved.load(dataset)
        for precision in precisions:
            what = f"{precision}, {saved.name}" if len(models) > 1 else precision
            done = functools.partial(_show, log, what, dataset.size("test"))
            with np.errstate(over="ignore", invalid="ignore"):  # which is told of as a whole
                given = scores(dataset, saved.model, cast(parameters, precision).values, Cpu(precision), world, done)
            overflown = world.comm.allreduce(int(np.count_nonzero(~np.isfinite(given).all(axis=1))))
            if overflown:
                log.say_aside(
                    f"{saved.name} has numbers that are too large for {precision}: scores of {overflown:,} of "
                    f"{dataset.size('test'):,} test images are infinite or NaN"
                )
            probabilities = softmax(given)
            yield saved.name, precision, gather(given, probabilities, dataset.test_labels, world)
            sums[precision] = sums.get(precision, 0.0) + probabilities
        del parameters  # before the next ones are loaded
    for precision, total in sums.items() if len(models) > 1 else ():
        mean = total / len(models)
        yield ENSEMBLE, precision, gather(mean, mean, dataset.test_labels, world)


def _show(log: RunLog, what: str, total: int, part: float) -> None:
    log.evaluating(what, round(part * total), total)


def _finite(scores: Array) -> NDArray[np.float64]:
    """float16 may have overflowed to infinity, which counts as the largest float64, and to NaN, which counts as 0."""
    return np.nan_to_num(scores.astype(np.float64))


def softmax(scores: Array) -> NDArray[np.float64]:
    """Probabilities (N, classes) from scores, computed in float64; what is not finite counts as _finite has it."""
    finite = _finite(scores)
    with np.errstate(over="ignore"):  # the largest less the lowest
        powers = np.exp(finite - finite.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


def gather(ranking: Array, probabilities: Array, labels: Labels, world: World) -> Answers:
    """The answers to all samples, from each rank's share of rows (share, classes); collective.

    ranking: the class with the largest number is the inference, and so are a model's scores, whose order is exact.
    """
    inferences = np.argmax(_finite(ranking), axis=1)  # or NaN would be the largest
    confidences = probabilities[np.arange(len(inferences)), inferences]
    mine = inferences.astype(np.int64), confidences.astype(np.float64)
    shares = zip(*world.comm.allgather(mine), strict=True)
    return Answers(ranking.shape[1], labels.astype(np.int64), *map(np.concatenate, shares))


def on_what(models: Sequence[SavedModel], dataset: Dataset) -> str:
    """What is judged, and on which data: for the title of a picture."""
    networks = {saved.file.network for saved in models}
    judged = networks.pop() if len(networks) == 1 else "models"
    if len(models) > 1:
        judged = f"{ENSEMBLE} of {len(models)} {judged}"
    return f"{judged} on {Path(dataset.name).name or dataset.name}"


def short_names(class_names: Sequence[str] | None) -> list[str] | None:
    """The names of the classes, of those that are too long the beginning and the end.

    Where these are the same of several, the number of the class is in front.
    """
    if class_names is None:
        return None
    short = [_shortened(name) for name in class_names]
    times = Counter(short)
    return [
        _shortened(f"{n}: {name}") if times[text] > 1 and text != name else text
        for n, (name, text) in enumerate(zip(class_names, short, strict=True))
    ]


def _shortened(name: str) -> str:
    end = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1 - end]}…{name[-end:]}"


def describe(answers: Answers, class_names: Sequence[str] | None = None) -> list[str]:
    """Lines that say how well each class is known and what it is taken for; of many classes, the worst alone."""
    names = short_names(class_names)
    lines = _table(answers, names) if answers.classes <= MOST_CLASSES else _worst(answers, names)
    return [*lines, "", f"expected calibration error: {answers.calibration_error():.2%} ({BINS} bins)"]


def _tags(title: str, width: int, classes: Sequence[int], names: list[str] | None) -> list[str]:
    """A column: the title, which is no longer than the width, and the number of each of these classes with its name."""
    longest = max((1 + len(names[n]) for n in classes), default=0) if names else 0
    tags = [f"{n:>{width}}" + (f" {names[n]}" if names else "") for n in classes]
    return [tag.ljust(width + longest) for tag in (title, *tags)]


def _table(answers: Answers, names: list[str] | None) -> list[str]:
    """A line for each label. Where there is no wrong inference stands a dot, so that the eye finds the others."""
    matrix = answers.confusion()
    width = max(3, len(f"{matrix.max():,}"))
    title, *tags = _tags("label", 5, range(len(matrix)), names)
    numbers = " ".join(f"{m:>{width}}" for m in range(len(matrix)))
    lines = [f"{title}  accuracy   inferences", " " * (len(title) + 13) + numbers]
    for n, row in enumerate(matrix):
        cells = (f"{count:,}" if count or n == m else "." for m, count in enumerate(row))
        lines.append(f"{tags[n]}  {_percent(row[n], row.sum())}   {' '.join(f'{cell:>{width}}' for cell in cells)}")
    return lines


def _worst(answers: Answers, names: list[str] | None) -> list[str]:
    """The classes of the lowest accuracy, and the pairs that are taken for each other most often.

    Of very many classes, the whole matrix would not fit in memory.
    """
    labels, totals = np.unique(answers.labels, return_counts=True)
    correct = totals - np.bincount(np.searchsorted(labels, answers.labels[~answers.right]), minlength=len(labels))
    worst = np.argsort(correct / totals, kind="stable")[:WORST]
    title, *tags = _tags("label", 5, labels[worst].tolist(), names)
    lines = [f"the worst of {answers.classes:,} classes", f"{title}  accuracy   correct"]
    for tag, i in zip(tags, worst, strict=True):
        lines.append(f"{tag}  {_percent(correct[i], totals[i])}   {correct[i]:,} of {totals[i]:,}")

    if not (confusions := answers.confusions()):
        return lines
    taken, taken_for, times = zip(*confusions, strict=True)
    columns = _tags("label", 5, taken, names), _tags("inference", 9, taken_for, names)
    counts = ["times", *(f"{count:,}" for count in times)]
    rows = [f"{label}  {inference}   {count}" for label, inference, count in zip(*columns, counts, strict=True)]
    return [*lines, "", "the most frequent confusions", *rows]


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:>8.2%}" if whole else f"{'-':>8}"  # no test image may have this label
