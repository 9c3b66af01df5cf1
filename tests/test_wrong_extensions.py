"""A task, an optimizer or data of a user's own that cannot work: one sentence says why, and no rank waits."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distconv.config import Config
from distconv.data import digits
from distconv.errors import BadDataError, UsageError
from distconv.nn.checked import checked
from distconv.nn.layers import Affine, Chain, Context
from distconv.nn.networks import build_network
from distconv.nn.normalization import ConvNorm
from distconv.nn.optimizers import SGD
from distconv.nn.parameters import Parameters
from distconv.run.build import check_data, check_sums, check_task, named_optimizer, named_task
from distconv.tasks.classify import Classification
from tests import jobs
from tests.test_failures import assert_one_sentence

HERE = sys.modules[__name__]


class Own:
    """Data whose sizes are given."""

    image_shape: Any = (8, 8, 1)
    classes: Any = 10
    digest = "own"

    def __init__(self, train: Any = 64, test: Any = 20, validation: Any = 0, **others: Any) -> None:
        self.sizes = {"train": train, "test": test, "validation": validation}
        self.__dict__.update(others)

    def size(self, part: str) -> Any:
        return self.sizes[part]

    def batch(self, part: str, samples: Any, context: Any) -> Any:
        return np.zeros((len(samples), 8, 8, 1), np.float32), samples % 10


DATA = [
    ({"train": 0}, "gives 0 as the size of train"),
    ({"test": -3}, "gives -3 as the size of test"),
    ({"train": 64.5}, "gives 64.5 as"),
    ({"train": "64"}, "gives '64' as"),
    ({"validation": None}, "gives None as the size of validation"),
    ({"image_shape": 8}, "has the image_shape 8"),
    ({"classes": 0}, "has 0 classes"),
]


@pytest.mark.parametrize(("given", "words"), DATA)
def test_data_that_cannot_be_is_a_usage_error(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_data("mine:data", Own(**given))


TASKS = [
    ({"sums": ()}, "1 to 4"),
    ({"sums": tuple("abcde")}, "but 1 to 4 of"),
    ({"sums": ("loss", "loss")}, "of different names"),
    ({"sums": "loss"}, "the sums 'loss'"),
    ({"sums": 3}, "the sums 3"),
    ({"sums": (1, 2)}, "a tuple of words"),
    ({"metric": "two words"}, "the metric 'two words'"),
    ({"metric": "loss"}, "the metric 'loss'"),
    ({"metric": 3}, "the metric 3"),
    ({"evaluate": None}, "has no evaluate"),
]


@pytest.mark.parametrize(("given", "words"), TASKS)
def test_a_task_that_cannot_be_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(HERE, "mine", type("Mine", (Classification,), given), raising=False)
    with pytest.raises(UsageError, match=words):
        named_task(f"{__name__}:mine")


@pytest.mark.parametrize(
    ("method", "gives", "words"),
    [
        ("output_shape", [8, 8, 1], "the output_shape [8, 8, 1], but a tuple"),
        ("output_shape", 10, "the output_shape 10, but"),
        ("output_shape", (8, 8), "outputs of shape (10,), but the task learns from outputs of shape (8, 8)"),
        ("blind_loss", None, "the blind_loss None, but a number"),
    ],
)
def test_what_a_task_wants_of_a_model_must_be_a_shape_and_a_number(method: str, gives: Any, words: str) -> None:
    task = type("Mine", (Classification,), {method: lambda self, data: gives})()
    data = digits.load()
    with pytest.raises(UsageError, match=re.escape(words)):
        wanted = check_task("mine:task", task, data)
        build_network("own", data.image_shape, 10, wanted, Chain(Affine(10)))


def test_a_class_is_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HERE, "mine", lambda: Classification, raising=False)
    with pytest.raises(UsageError, match="the class Classification"):
        named_task(f"{__name__}:mine")


@pytest.mark.parametrize("found", [1.0, None, (1.0,), (1.0, 2.0, 3.0), ("x", 1.0), (np.zeros(3), 1.0)])
def test_what_a_task_gives_must_be_its_sums(found: Any) -> None:
    with pytest.raises(UsageError, match="a tuple of 2 numbers was expected"):
        check_sums("evaluate", found, 2)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda lr: SGD(lr), "called with 2 arguments"),
        (lambda lr, steps: 3, "returned a int"),
        (lambda lr, steps: SGD, "returned the class SGD"),
        (lambda lr, steps: SGD("fast"), "learning rates"),
        (lambda lr, steps: SGD(lambda t: None), "learning rates"),
        (lambda lr, steps: SGD(lambda t: float("nan")), "learning rates"),
        (lambda lr, steps: type("Own", (SGD,), {"slots": ("v", "value")})(lr), "the slot value, .* the weights' own"),
        (lambda lr, steps: type("Own", (SGD,), {"slots": ("ema",)})(lr), "the slot ema, .* --ema's"),
    ],
)
def test_an_optimizer_that_cannot_be_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, factory: Any, words: str
) -> None:
    monkeypatch.setattr(HERE, "mine", factory, raising=False)
    with pytest.raises(UsageError, match=words):
        named_optimizer(Config(optimizer=f"{__name__}:mine"), 10)


BATCHES = [
    (lambda x: x[..., 0], "needs images (H, W, C), but what comes in has shape (8, 8): have batches be floats of"),
    (lambda x: np.repeat(x, 3, -1), "ConvNorm was given float32 of shape (2, 8, 8, 3), for which its parameters"),
    (lambda x: x[:, :7], "Affine was given float32 of shape (2, 7, 8, 16), for which its parameters are not made"),
    (lambda x: x.astype(np.uint8), "ConvNorm was given uint8 of shape (2, 8, 8, 1), but floats of 32 or 64 bits"),
    (lambda x: x.astype(">f4"), "ConvNorm was given >f4 of shape (2, 8, 8, 1), but floats of 32 or 64 bits"),
    (np.ndarray.tolist, "ConvNorm was given a list, but floats"),
]
GRADIENTS = [
    (lambda dy: dy[:, 0], "was given float32 of shape (2,), but floats of shape (2, 10), as its forward pass gave"),
    (lambda dy: dy[:1], "the backward pass of Affine was given float32 of shape (1, 10)"),
    (lambda dy: np.repeat(dy, 9, 0), "of shape (18, 10)"),
    (lambda dy: np.sign(dy).astype(np.int8), "was given int8 of shape (2, 10), but floats"),
    (lambda dy: dy.tolist(), "was given a list"),
    (lambda dy: 1.0, "was given a float"),
]


@pytest.mark.parametrize(
    ("batch", "gradient", "words"),
    [*((change, np.copy, words) for change, words in BATCHES), *((np.copy, *given) for given in GRADIENTS)],
)
def test_other_shapes_of_data_and_tasks_do_not_reach_compiled_code(batch: Any, gradient: Any, words: str) -> None:
    model, specs = build_network("own", (8, 8, 1), 10, (10,), Chain(ConvNorm(16), Affine(10)))
    weights, context = Parameters(specs), Context(True, samples=np.arange(2))

    def step() -> None:
        y, backward = checked(model).forward(batch(np.zeros((2, 8, 8, 1), np.float32)), weights.values, context)
        backward(gradient(y), weights.grads, False)

    with pytest.raises(UsageError, match=re.escape(words)):
        step()


@pytest.mark.parametrize("labels", [[0, 10], [-1, 0], [0, 0, 0]])
def test_labels_that_are_no_classes_are_bad_data(labels: list[int]) -> None:
    model, x = Affine(10), np.zeros((2, 4), np.float32)
    weights = Parameters(model.shapes((4,))[1])
    with pytest.raises(BadDataError, match="from 0 to 9 was expected"):
        Classification().gradient(model, weights.values, weights.grads, (x, np.array(labels)), Context(True))


def test_data_of_another_size_on_one_rank_ends_the_job_and_does_not_hang_it(tmp_path: Path) -> None:
    (tmp_path / "of_a_user.py").write_text(
        "from distconv.process.launched import launcher_rank\n"
        "from tests.test_wrong_extensions import Own\n"
        "def data(): return Own(64 + launcher_rank())\n"
    )
    flags = ("--data", "of_a_user:data", "--out", tmp_path / "run")
    result = jobs.run(2, "-m", "distconv.train", *flags, PYTHONPATH=str(tmp_path))
    assert_one_sentence(result, 78, "rank 1 differs from rank 0")


def test_ranks_whose_data_are_drawn_at_random_are_told_of_seeds(tmp_path: Path) -> None:
    (tmp_path / "of_a_user.py").write_text(
        "import numpy as np\n"
        "from distconv.data.dataset import Dataset\n"
        "def data():\n"
        "    images = np.random.default_rng().integers(0, 256, (4, 8, 8), np.uint8)\n"
        "    return Dataset('random', images, np.arange(4), images, np.arange(4))\n"
    )
    flags = ("--data", "of_a_user:data", "--out", tmp_path / "run")
    result = jobs.run(2, "-m", "distconv.train", *flags, PYTHONPATH=str(tmp_path))
    assert_one_sentence(result, 78, "rank 1 differs from rank 0 (draw from a seed")
