"""Learning rates over a run, each shape against a formula of its own; and what rates a run is given by its settings."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from distconv.config import SCHEDULES, Config
from distconv.errors import UsageError
from distconv.nn.optimizers import OPTIMIZERS
from distconv.nn.schedules import SHAPES, Schedule
from distconv.run.build import learning_rate, named_optimizer, named_task
from tests import jobs
from tests.test_failures import assert_one_sentence

LR, STEPS = 0.1, 40
# The rate, as a share of lr, k steps after the first of those T that follow the warm-up.
FORMULAS: dict[str, Callable[[int, int], float]] = {
    "constant": lambda k, T: 1,
    "linear": lambda k, T: (T - k) / T,
    "cosine": lambda k, T: math.cos(math.pi * k / (2 * T)) ** 2,
    "one-cycle": lambda k, T: (T - k) / T,
    "step": lambda k, T: 1 if 2 * k < T else 0.1 if 4 * k < 3 * T else 0.01,
    "exponential": lambda k, T: math.exp(-math.log(100) * k / T),
}
every_shape = pytest.mark.parametrize("shape", FORMULAS)


def rates(shape: str, warmup: int, lr: float = LR, steps: int = STEPS) -> list[float]:
    schedule = Schedule(lr, shape, steps, warmup)
    return [schedule(t) for t in range(1, steps + 1)]


def test_the_shapes_are_those_of_the_command_line() -> None:
    assert sorted(SCHEDULES) == sorted(SHAPES) == sorted(FORMULAS)


@every_shape
@pytest.mark.parametrize("warmup", [0, 1, 8, 39])
def test_every_rate_is_that_of_the_formula(shape: str, warmup: int) -> None:
    up = warmup or (12 if shape == "one-cycle" else 0)  # 30 % of the steps
    rising = [LR * t / up for t in range(1, up + 1)]
    falling = [LR * FORMULAS[shape](k, STEPS - up) for k in range(STEPS - up)]
    assert rates(shape, warmup) == pytest.approx(rising + falling, rel=1e-12)


@every_shape
def test_a_warm_up_ends_at_the_rate_itself_whatever_it_is_and_however_long(shape: str) -> None:
    for lr in (0.001, 0.1, 0.3, 1e-300):
        for warmup in range(1, 100):
            assert Schedule(lr, shape, 100, warmup)(warmup) == lr


@every_shape
def test_rates_go_up_to_the_peak_and_from_there_never_up_again(shape: str) -> None:
    found = rates(shape, 8)
    assert max(found) == LR and found.index(LR) == 7
    assert found[:8] == sorted(set(found[:8]))
    assert found[8:] == sorted(found[8:], reverse=True)
    assert min(found) > 0


def test_a_one_cycle_has_its_peak_after_three_tenths_of_the_steps() -> None:
    for steps in (10, 40, 1000):
        found = rates("one-cycle", 0, steps=steps)
        assert found.index(max(found)) == 3 * steps // 10 - 1 and max(found) == LR
        assert found[0] == pytest.approx(LR / (3 * steps // 10))


@every_shape
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_rates_above_0(shape: str, steps: int) -> None:
    for warmup in range(steps + 1):
        assert all(0 < rate <= LR for rate in rates(shape, warmup, steps=steps))


@every_shape
def test_a_rate_depends_on_its_step_alone(shape: str) -> None:
    schedule, order = Schedule(LR, shape, STEPS, 5), list(range(1, STEPS + 1))
    random.Random(0).shuffle(order)
    found = {t: schedule(t) for t in order}
    assert [found[t] for t in sorted(found)] == rates(shape, 5)


@pytest.mark.parametrize(
    ("rule", "batch_size", "lr"),
    [
        ("none", 400, 0.01),
        ("linear", 400, 0.04),
        ("linear", 25, 0.0025),
        ("sqrt", 400, 0.02),
        ("sqrt", 25, 0.005),
        ("sqrt", 100, 0.01),
    ],
)
def test_a_rate_grows_with_the_batch_as_the_rule_says(rule: str, batch_size: int, lr: float) -> None:
    found = learning_rate(Config(lr=0.01, scale_lr=rule, batch_size=batch_size), 10)
    assert found == pytest.approx(lr, rel=1e-12)  # a number: nothing changes it over the run
    warm = learning_rate(Config(lr=0.01, scale_lr=rule, batch_size=batch_size, warmup_epochs=0.5), 10)
    assert callable(warm) and warm(5) == warm(200) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_gets_the_rates_of_its_run_and_the_decay(name: str) -> None:
    settings = Config(
        optimizer=name, lr=0.2, epochs=4, schedule="linear", warmup_epochs=1.5, weight_decay=0.5, batch_size=25,
        scale_lr="sqrt",
    )  # fmt: skip
    optimizer = named_optimizer(settings, 10)
    assert [optimizer.rate(t) for t in (1, 15, 16, 28, 40)] == pytest.approx([0.1 / 15, 0.1, 0.1, 0.052, 0.004])
    assert optimizer.numbers(28)[0] == pytest.approx(1 - 0.052 * 0.5)


def test_an_optimizer_of_the_users_own_gets_the_scaled_rate_as_a_number() -> None:
    optimizer = named_optimizer(Config(optimizer="examples.schedule:adamw", scale_lr="linear", batch_size=50), 10)
    assert optimizer.rate(20) == pytest.approx(0.0005)  # the end of its own warm-up


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Config(warmup_epochs=2, epochs=2), "--warmup-epochs 2 with --epochs 2: a warm-up that ends before"),
        (Config(warmup_epochs=3.5, epochs=2), "--warmup-epochs 3.5 with --epochs 2"),
        (Config(optimizer="examples.schedule:adamw", weight_decay=0.1), "--weight-decay is for the optimizers that"),
        (Config(optimizer="examples.schedule:adamw", schedule="step"), "--schedule, or --warmup-epochs, is for"),
        (Config(optimizer="examples.schedule:adamw", warmup_epochs=1), "--schedule, or --warmup-epochs, is for"),
        (Config(task="mine:task", label_smoothing=0.1), "--label-smoothing is for --task classify: mine:task has"),
        (Config(lr=1e308, scale_lr="linear", batch_size=1000), "has the learning rates"),  # no float is so large
    ],
)
def test_settings_that_do_not_fit_each_other_are_one_sentence(settings: Config, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        named_task(settings.task, settings.label_smoothing)
        named_optimizer(settings, 10)
    assert words in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_warm_up_that_outlasts_the_run_ends_all_ranks_with_code_2() -> None:
    flags = ("--data", "digits", "--epochs", "2", "--warmup-epochs", "2")
    assert_one_sentence(jobs.run(2, "-m", "distconv.train", *flags), 2, "--warmup-epochs 2 with --epochs 2")
