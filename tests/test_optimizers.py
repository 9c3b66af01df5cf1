"""The six optimizers against textbook loops over Python numbers, and what the trainer relies on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from distconv.nn import optimizers
from distconv.nn.optimizers import OPTIMIZERS
from tests import reference
from tests.files import peak_memory

SIZE, STEPS, LR = 7, 25, 0.01
SLOTS = {"sgd": "", "momentum": "v", "nesterov": "v", "adagrad": "h", "rmsprop": "h", "adam": "mv"}
all_six = pytest.mark.parametrize("name", reference.OPTIMIZERS)


def textbook(name: str, p: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """p (SIZE,), gradients (STEPS, SIZE) -> p after each step (STEPS, SIZE), one number at a time."""
    rule = reference.OPTIMIZERS[name]
    return np.array([list(rule(float(p[i]), map(float, gradients[:, i]), LR)) for i in range(SIZE)]).T


def start(dtype: type) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    p, gradients = rng.standard_normal(SIZE), rng.standard_normal((STEPS, SIZE))
    gradients[:, 0] = 0  # a parameter that the loss does not see
    gradients[:, 1] *= 1e-6  # so small that the epsilon of the divisions shows
    return p.astype(dtype), gradients.astype(dtype)


def stepper(name: str, size: int, dtype: type, lr: float = LR) -> Callable[[np.ndarray, np.ndarray, int], None]:
    """Makes steps of an optimizer, which has its state as an attribute."""
    optimizer = OPTIMIZERS[name](lr)
    state = optimizer.new_state(size, dtype)

    def step(p: np.ndarray, g: np.ndarray, t: int) -> None:
        optimizer.step(p, g, optimizer.numbers(t), *state.values())

    step.state = state  # type: ignore[attr-defined]
    return step


def test_the_six_are_those_of_the_command_line():
    assert sorted(OPTIMIZERS) == sorted(reference.OPTIMIZERS)


@all_six
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_every_step_is_the_textbooks(name, dtype, tolerance):
    p, gradients = start(dtype)
    expected = textbook(name, p, gradients)
    step = stepper(name, SIZE, dtype)
    for t, g in enumerate(gradients, start=1):
        step(p, g, t)
        np.testing.assert_allclose(p, expected[t - 1], rtol=tolerance, atol=0)


@all_six
def test_a_step_changes_parameters_and_state_in_place_and_leaves_the_gradient_alone(name):
    p, gradients = start(np.float32)
    gradients.flags.writeable = False
    step, memory = stepper(name, SIZE, np.float32), p.ctypes.data
    for t, g in enumerate(gradients, start=1):
        before = p.copy()
        step(p, g, t)
        assert np.all((p != before)[2:])
    assert p.dtype == np.float32
    assert p.ctypes.data == memory
    for vector in step.state.values():
        assert vector.dtype == np.float32
        assert np.all(vector[2:] != 0)


@all_six
def test_the_state_is_named_after_the_formula_and_zero_at_the_start(name):
    state = OPTIMIZERS[name](LR).new_state(SIZE, np.float64)
    assert list(state) == list(SLOTS[name])
    for vector in state.values():
        np.testing.assert_array_equal(vector, np.zeros(SIZE), strict=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_schedule_says_the_rate_of_every_step(name):
    """Two steps at a rate and two at another are those of two constant rates, one after the other."""
    scheduled, first, second = (OPTIMIZERS[name](lr) for lr in (lambda t: LR if t < 3 else LR / 8, LR, LR / 8))
    p, gradients = start(np.float64)
    found, wanted = (p.copy(), scheduled.new_state(SIZE, p.dtype)), (p.copy(), first.new_state(SIZE, p.dtype))
    for t, g in enumerate(gradients[:4], start=1):
        for optimizer, (vector, state) in ((scheduled, found), (first if t < 3 else second, wanted)):
            optimizer.step(vector, g, optimizer.numbers(t), *state.values())
    np.testing.assert_array_equal(found[0], wanted[0])


@pytest.mark.parametrize(
    ("name", "lr"),
    [("sgd", 0.1), ("momentum", 0.02), ("nesterov", 0.02), ("adagrad", 0.5), ("rmsprop", 0.01), ("adam", 0.05)],
)
def test_a_parabola_leads_to_its_lowest_point(name, lr):
    lowest, curvature = np.array([1.0, -2.0, 0.5]), np.array([1.0, 10.0, 3.0])
    p = np.zeros(3)
    step = stepper(name, 3, np.float64, lr)
    for t in range(1, 501):
        step(p, curvature * (p - lowest), t)
    np.testing.assert_allclose(p, lowest, atol=0.02)


@all_six
def test_pieces_change_no_bit(name, monkeypatch):
    found = []
    for piece in (SIZE, 3):  # one piece, and three
        monkeypatch.setattr(optimizers, "PIECE", piece)
        p, gradients = start(np.float32)
        step = stepper(name, SIZE, np.float32)
        for t, g in enumerate(gradients, start=1):
            step(p, g, t)
        found.append([p.tobytes(), *(vector.tobytes() for vector in step.state.values())])
    assert found[0] == found[1]


@all_six
def test_a_step_of_a_large_model_takes_no_memory_to_speak_of(name):
    p, g = np.zeros((2, 4_000_000), np.float32)
    step = stepper(name, p.size, np.float32)
    step(p, g, 1)  # compiles
    assert peak_memory(lambda: step(p, g, 1)) < p.nbytes / 4
