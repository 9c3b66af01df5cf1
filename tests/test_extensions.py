"""The examples that extend distconv, as a user starts them: each does what it is for, on one rank as on two."""

from __future__ import annotations

import functools
import importlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distconv.data import digits
from distconv.data.shard import epoch_order
from distconv.kernels.cpu.device import Cpu
from distconv.nn.layers import Context
from distconv.nn.networks import build_network
from distconv.nn.parameters import Parameters, count
from distconv.run.checkpoint import load_checkpoint
from distconv.run.folder import find_checkpoints
from examples import gan, q_learning, schedule
from tests import jobs
from tests.test_train import metrics, parameters

BATCH = 33  # does not divide among two ranks
EXAMPLES = {  # by what is taken from each, and how short a run tells enough
    "running_means": ("--model", "--data=digits", "--epochs=2", "--limit-train=99"),
    "blocks": ("--model", "--data=digits", "--epochs=2", "--limit-train=99", "--shards=2"),
    "batch_norm": ("--model", "--data=digits", "--epochs=2", "--limit-train=99", "--shards=2"),
    "siamese": ("--model", "--data", "--task", "--epochs=3", "--limit-train=66"),
    "schedule": ("--optimizer", "--data=digits", "--model=simpleconvnet", "--epochs=3", "--limit-train=66"),
    "segmentation": ("--model", "--data", "--task", "--epochs=3", "--limit-train=99", "--lr=0.01"),
    "gan": ("--model", "--data", "--task", "--optimizer", "--epochs=2", "--batch-size=479"),
    "q_learning": ("--model", "--data", "--task", "--epochs=4", "--lr=0.003"),
}
# Names that are not those of the flags.
OF = {"--model": {"batch_norm": "small"}, "--optimizer": {"schedule": "adamw", "gan": "in_turn"}}


def flags(name: str) -> list[str]:
    """Of a run of an example; float64 on the wire shows any difference between one rank and two."""
    given = [
        part if "=" in part else f"{part}=examples.{name}:{OF.get(part, {}).get(name, part[2:])}"
        for part in EXAMPLES[name]
    ]
    return ["-m", "distconv.train", f"--batch-size={BATCH}", "--wire=float64", "--eval-samples=40", *given]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of an example's run on so many ranks, one or two."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def both(name: str) -> None:
        with ThreadPoolExecutor() as pool:  # as there are two cores
            for run in [pool.submit(train, *flags(name), "--out", folder / f"{name}{P}", ranks=P) for P in (1, 2)]:
                run.result()

    def run(name: str, ranks: int) -> Path:
        both(name)
        return folder / f"{name}{ranks}"

    return run


def train(*arguments: str | Path, ranks: int, **environment: str) -> None:
    """A run that must end well; without mpirun on one rank."""
    result = jobs.run(ranks if ranks > 1 else 0, *arguments, OPENBLAS_NUM_THREADS="1", **environment)
    assert result.returncode == 0, result.stdout + result.stderr


def state(out: Path) -> dict[str, Any]:
    """The arrays of the last checkpoint, by name."""
    return dict(load_checkpoint(find_checkpoints(out / "checkpoints")[0]).tensors)


def scores(out: Path, name: str) -> list[float]:
    """Of each epoch."""
    return [record[name] for record in metrics(out, "epoch")]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("schedule", "siamese"))) for name in EXAMPLES]
)
def test_an_example_trains_on_two_ranks_as_on_one(run_of: Any, name: str) -> None:
    one, two = (metrics(run_of(name, ranks), "step")[:12] for ranks in (1, 2))
    assert len({record["train_loss"] for record in one}) == len(one) >= 6
    for sum_name in ("train_loss", "artist_loss") if name == "gan" else ("train_loss",):
        np.testing.assert_allclose([r[sum_name] for r in two], [r[sum_name] for r in one], rtol=1e-9)


@pytest.mark.parametrize(("name", "parameters"), [("deep", 101_476), ("small", 29_178)])
def test_networks_with_batch_norm_are_as_large_as_they_say(name: str, parameters: int) -> None:
    _, specs = build_network(f"examples.batch_norm:{name}", (28, 28, 1), 10, (10,))
    assert count(specs, lambda spec: spec.trained) == parameters


def test_running_means_are_those_of_all_samples_of_all_ranks(run_of: Any) -> None:
    images, mean, variance = digits.load().train_images / 255, 0.0, 1.0
    for epoch in range(2):
        for samples in np.split(epoch_order(0, epoch, 99), 3):
            apart = images[samples] - mean
            mean, variance = mean + 0.1 * apart.mean(), variance + 0.1 * ((apart**2).mean() - variance)
    found = state(run_of("running_means", 2))
    np.testing.assert_allclose(found["value/standardise1.mean"], mean, rtol=1e-9)
    np.testing.assert_allclose(found["value/standardise1.variance"], variance, rtol=1e-9)
    assert not found["m/standardise1.mean"].any()  # no optimizer has touched it


def test_the_intersection_over_union_rises(run_of: Any) -> None:
    found = scores(run_of("segmentation", 2), "test_iou")
    assert found[0] < found[-1] and found[-1] > 0.5


def test_the_walker_finds_the_shortest_ways(run_of: Any) -> None:
    goal = tuple(map(int, np.argwhere(q_learning.MAZE == "G")[0]))
    moves, front = {goal: 0}, deque([goal])
    while front:  # breadth first, from the goal back
        cell = front.popleft()
        for there in (tuple(map(int, np.add(cell, step))) for step in q_learning.MOVES):
            if there not in moves and there in set(map(tuple, q_learning.CELLS.tolist())):
                moves[there] = moves[cell] + 1
                front.append(there)
    best = np.mean([q_learning.DISCOUNT ** (n - 1) for cell, n in moves.items() if cell != goal])
    assert len(moves) == len(q_learning.CELLS) + 1
    assert 0.95 * best < metrics(run_of("q_learning", 2), "final")[0]["test_return"] <= best * (1 + 1e-9)


def test_a_gan_that_is_stopped_between_two_turns_goes_on_to_the_same_bits(run_of: Any, tmp_path: Path) -> None:
    for epochs in (1, 2):  # of 3 steps: the judge has learned last
        train(*flags("gan"), f"--epochs={epochs}", "--out", tmp_path / "run", ranks=2)
    assert parameters(tmp_path / "run") == parameters(run_of("gan", 2))


def test_the_network_whose_turn_it_is_not_stands_still() -> None:
    optimizer, random = gan.in_turn(0.1, 100), np.random.default_rng(0)
    p, m, v, g = random.random((4, 100)).astype(np.float32)
    g[::2] = 0
    before = np.array([p, m, v])
    optimizer.step(p, g, optimizer.numbers(7), m, v)
    moved = np.array([p, m, v]) != before
    assert not moved[:, ::2].any() and moved[:, 1::2].all()
    assert optimizer.numbers(1) == optimizer.numbers(2) != optimizer.numbers(3)  # each learns in every other step


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    optimizer = schedule.adamw(0.4, 100)
    rates = [optimizer.rate(t) for t in range(1, 101)]
    assert rates[:20] == pytest.approx(np.linspace(0.02, 0.4, 20))
    assert rates[60 - 1] == pytest.approx(0.2) and rates[-1] == pytest.approx(0)


STANDS_STILL = """
from distconv.nn.layers import Affine, Chain
from distconv.nn.parameters import Spec
from distconv.tasks.classify import Classification

class Still(Classification):
    def gradient(self, model, values, grads, batch, context):
        return (1.0,)

class Ones(Affine):
    def shapes(self, shape):
        outputs, specs = super().shapes(shape)
        return outputs, {name: Spec(spec.shape, mean=1.0, decay=spec.decay) for name, spec in specs.items()}

def network(classes):
    return Chain(Ones(classes))
"""


def test_weights_decay_at_the_rate_of_the_schedule_and_biases_do_not(tmp_path: Path) -> None:
    (tmp_path / "still.py").write_text(STANDS_STILL)
    mine = ("--task=still:Still", "--model=still:network", "--limit-train=300")
    train(*flags("schedule"), *mine, "--out", tmp_path / "run", ranks=1, PYTHONPATH=str(tmp_path))
    found, steps = state(tmp_path / "run"), len(metrics(tmp_path / "run", "step"))
    rate = schedule.adamw(0.001, steps).rate
    np.testing.assert_allclose(
        found["value/ones1.W"], np.prod([1 - schedule.WEIGHT_DECAY * rate(t) for t in range(1, steps + 1)]), rtol=1e-12
    )
    assert (found["value/ones1.b"] == 1).all()


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", ["siamese", "segmentation", "gan"])
def test_the_gradient_of_an_example_is_the_slope_of_its_loss(name: str, step: int) -> None:
    example, random = importlib.import_module(f"examples.{name}"), np.random.default_rng(0)
    data, task = example.data(), example.task()
    model, specs = build_network(f"examples.{name}:model", data.image_shape, data.classes, task.output_shape(data))
    weights, samples = Parameters(specs, np.float64), np.arange(6)
    weights.vector[...] = random.normal(0, 0.1, weights.size)  # no bias is 0, where a ReLU has no slope
    context = Context(True, step=step, samples=samples, kernels=Cpu(np.float64), global_batch=12)
    batch = data.batch("train", samples, context)

    def loss() -> float:
        return float(task.gradient(model, weights.values, weights.grads, batch, context)[step if name == "gan" else 0])

    loss()
    turn = {"gan": ["judge", "artist"][step]}.get(name, "")
    still = [grad for path, grad in weights.named(weights.gradient).items() if not path.startswith(turn)]
    assert not any(grad.any() for grad in still)
    towards = random.standard_normal(weights.size) * (weights.gradient != 0)
    slope, start = weights.gradient @ towards * 12, weights.vector.copy()
    ends = []
    for way in (1e-8, -1e-8):
        weights.vector[...] = start + way * towards
        ends.append(loss())
    assert (ends[0] - ends[1]) / 2e-8 == pytest.approx(slope, rel=1e-4)
