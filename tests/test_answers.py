"""What models answer: the numbers against loops, and the text for people."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distconv.errors import UsageError
from distconv.run.answers import LONGEST_NAME, Answers, describe, gather, on_what, short_names, softmax


def drawn(classes: int, N: int, seed: int = 0) -> Answers:
    random = np.random.default_rng(seed)
    labels, guesses = random.integers(0, classes, (2, N))
    confidences = np.concatenate([np.arange(16) / 15, random.random(N)])[:N]  # the edges of the bins, too
    return Answers(classes, labels, np.where(random.random(N) < 0.7, labels, guesses), confidences)


def test_the_calibration_error_weighs_what_each_bin_is_off() -> None:
    answers = drawn(7, 500)
    error = 0.0
    for low, high in ((m / 15, (m + 1) / 15) for m in range(15)):
        inside = (answers.confidences > low if low else answers.confidences >= 0) & (answers.confidences <= high)
        if inside.any():
            gap = abs(answers.right[inside].mean() - answers.confidences[inside].mean())
            error += gap * np.count_nonzero(inside) / 500
    assert answers.calibration_error() == pytest.approx(error, rel=1e-12)


def test_confusions_are_counted_by_label_and_inference() -> None:
    answers = drawn(5, 300)
    expected = np.zeros((5, 5), int)
    for label, inference in zip(answers.labels, answers.inferences, strict=True):
        expected[label, inference] += 1
    np.testing.assert_array_equal(answers.confusion(), expected)
    with pytest.raises(UsageError, match="20,001 classes: a matrix of up to 10,000"):
        dataclasses.replace(answers, classes=20_001).confusion()
    assert answers.correct == np.trace(expected)


def test_the_hardest_are_wrong_and_come_by_confidence() -> None:
    answers = Answers(3, np.array([0, 1, 2, 0, 1]), np.array([1, 1, 0, 2, 0]), np.array([0.5, 0.9, 0.8, 0.5, 0.7]))
    assert answers.hardest().tolist() == [2, 4, 0, 3]  # of two that are equally sure, the first in the test set


def test_softmax_is_of_float64_and_takes_what_float16_overflows_to() -> None:
    scores = np.random.default_rng(0).normal(0, 20, (50, 4)).astype(np.float16)
    powers = np.exp(scores.astype(float))
    np.testing.assert_allclose(softmax(scores), powers / powers.sum(axis=1, keepdims=True), rtol=1e-12)
    huge = softmax(np.array([[np.inf, 1, -np.inf], [np.nan, 5e4, 0], [-np.inf, -np.inf, -np.inf]], np.float16))
    np.testing.assert_allclose(huge, [[1, 0, 0], [0, 1, 0], [1 / 3, 1 / 3, 1 / 3]])


def test_of_many_classes_the_ten_worst_are_told() -> None:
    labels = np.repeat(np.arange(30), 40)  # class c is taken c times for the next one, and class 30 has no image
    inferences = np.where(np.arange(1200) % 40 < labels, labels + 1, labels)
    lines = describe(Answers(31, labels, inferences, np.full(1200, 0.5)))
    worst, confusions = lines[2:12], lines[15:25]
    assert [line.split() for line in worst] == [
        [str(c), f"{1 - c / 40:.2%}", str(40 - c), "of", "40"] for c in range(29, 19, -1)
    ]
    assert [line.split() for line in confusions] == [[str(c), str(c + 1), str(c)] for c in range(29, 19, -1)]
    right = describe(Answers(1000, labels, labels, np.ones(1200)))
    assert right[-1] == "expected calibration error: 0.00% (15 bins)" and "confusions" not in "".join(right)


def test_classes_with_names_are_told_by_them_and_columns_stand_below_one_another() -> None:
    labels = np.repeat([0, 1, 2], [5, 2000, 3])
    answers = Answers(3, labels, np.where(np.arange(2008) < 2, 2, labels), np.full(2008, 0.9))
    assert describe(answers, ("cat", "automobile", "a name that goes on and on"))[:5] == [
        "label                       accuracy   inferences",
        "                                           0     1     2",
        "    0 cat                     60.00%       3     .     2",
        "    1 automobile             100.00%       . 2,000     .",
        "    2 a name th… on and on   100.00%       .     .     3",
    ]
    many = Answers(31, np.array([30, 4, 4]), np.array([4, 4, 4]), np.ones(3))
    lines = describe(many, [f"class {'x' * n}"[:15] for n in range(31)])
    assert lines[1:4] == [
        "label                  accuracy   correct",
        "   30 class xxxxxxxxx     0.00%   0 of 1",
        "    4 class xxxx        100.00%   2 of 2",
    ]
    assert lines[6:8] == [
        "label                  inference              times",
        "   30 class xxxxxxxxx          4 class xxxx   1",
    ]


def test_names_that_are_too_long_are_told_apart() -> None:
    pairs = ["Cherry_(including_sour)_healthy", "Cherry_(including_sour)_mildew", "apple"]
    assert short_names(pairs) == ["Cherry_(i…r)_healthy", "Cherry_(i…ur)_mildew", "apple"]
    alike = [f"beginning {'x' * n} the same end" for n in range(10, 110)]
    shown = short_names(alike) or []
    assert len(set(shown)) == len(alike) and max(map(len, shown)) <= LONGEST_NAME and shown[99].startswith("99: ")
    assert short_names(["twice", "twice"]) == ["twice", "twice"] and short_names(None) is None


def test_of_few_classes_all_are_told_and_columns_stand_below_one_another() -> None:
    labels = np.repeat([0, 1, 3], [5, 2000, 3])
    lines = describe(Answers(4, labels, np.where(np.arange(2008) < 2, 3, labels), np.full(2008, 0.9)))
    assert lines[:6] == [
        "label  accuracy   inferences",
        "                      0     1     2     3",
        "    0    60.00%       3     .     .     2",
        "    1   100.00%       . 2,000     .     .",
        "    2         -       .     .     0     .",
        "    3   100.00%       .     .     .     3",
    ]


@pytest.mark.parametrize(
    ("networks", "name", "title"),
    [
        (["resnet20"], "/scratch/data/cifar", "resnet20 on cifar"),
        (["vgg11", "vgg11", "vgg11"], "mnist", "ensemble of 3 vgg11 on mnist"),
        (["vgg11", "resnet20"], "mine:data", "ensemble of 2 models on mine:data"),
    ],
)
def test_a_picture_tells_what_was_judged_and_on_which_data(networks: list[str], name: str, title: str) -> None:
    models: Any = [SimpleNamespace(file=SimpleNamespace(network=network)) for network in networks]
    dataset: Any = SimpleNamespace(name=name)
    assert on_what(models, dataset) == title


def test_a_score_that_is_not_a_number_is_no_inference_and_infinity_is() -> None:
    alone: Any = SimpleNamespace(comm=SimpleNamespace(allgather=lambda mine: [mine]))
    given = np.array([[math.nan, 2, 1], [65504, math.inf, 0], [math.nan, -1, -2]], np.float16)
    assert gather(given, softmax(given), np.arange(3), alone).inferences.tolist() == [1, 1, 0]
