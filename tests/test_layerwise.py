"""LARS and LAMB, and the clipping of a gradient, against loops over single numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from distconv.kernels.cpu.device import Cpu
from distconv.kernels.gpu.arithmetic import Gpu
from distconv.kernels.interface import FINITE
from distconv.nn.layerwise import ALL_OPTIMIZERS, LAMB, LARS, Layerwise
from distconv.nn.optimizers import OPTIMIZERS
from distconv.nn.parameters import Parameters, Spec

LR, DECAY, STEPS = 0.3, 0.02, 4


def length(numbers: Sequence[float]) -> float:
    return math.sqrt(math.fsum(number * number for number in numbers))


def lars(p: list[float], gradients: list[list[float]], trusting: bool) -> list[float]:
    v, decay = [0.0] * len(p), DECAY if trusting else 0.0
    for g in gradients:
        trust = 1.0
        if trusting and length(p) and length(g):
            trust = 0.001 * length(p) / (length(g) + decay * length(p))
        v = [0.9 * vi + LR * trust * (gi + decay * pi) for vi, gi, pi in zip(v, g, p, strict=True)]
        p = [pi - vi for pi, vi in zip(p, v, strict=True)]
    return p


def lamb(p: list[float], gradients: list[list[float]], trusting: bool) -> list[float]:
    m, v, decay = [0.0] * len(p), [0.0] * len(p), DECAY if trusting else 0.0
    for t, g in enumerate(gradients, start=1):
        m = [0.9 * mi + 0.1 * gi for mi, gi in zip(m, g, strict=True)]
        v = [0.999 * vi + 0.001 * gi * gi for vi, gi in zip(v, g, strict=True)]
        u = [
            mi / (1 - 0.9**t) / (math.sqrt(vi / (1 - 0.999**t)) + 1e-6) + decay * pi
            for mi, vi, pi in zip(m, v, p, strict=True)
        ]
        trust = length(p) / length(u) if trusting and length(p) and length(u) else 1.0
        p = [pi - LR * trust * ui for pi, ui in zip(p, u, strict=True)]
    return p


@pytest.mark.parametrize("trusting", [True, False])
@pytest.mark.parametrize(("kind", "loop"), [(LARS, lars), (LAMB, lamb)])
@pytest.mark.parametrize("start", [1.0, 0.0])
def test_a_step_is_that_of_the_paper(kind: type[Layerwise], loop: object, trusting: bool, start: float) -> None:
    rng = np.random.default_rng(0)
    p, gradients = start * rng.standard_normal(50), [rng.standard_normal(50) for _ in range(STEPS)]
    expected = loop(p.tolist(), [g.tolist() for g in gradients], trusting)  # type: ignore[operator]
    (matrices, _), (biases, _) = kind(LR, DECAY).rules()
    rule = matrices if trusting else biases
    state = rule.new_state(50, np.float64)
    for t, g in enumerate(gradients, start=1):
        rule.step(p, g, rule.numbers(t), *state.values())
    np.testing.assert_allclose(p, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_what_decays_is_scaled_and_what_does_not_is_not(kind: type[Layerwise]) -> None:
    specs = [Spec((3,)), Spec((3,), decay=False), Spec((3,), trained=False)]
    rules = kind(LR).rules()
    assert [[of(spec) for spec in specs] for _, of in rules] == [[True, False, False], [False, True, False]]
    assert [rule.trusting for rule, _ in rules] == [True, False]  # type: ignore[attr-defined]


def test_arrays_that_lie_side_by_side_are_moved_one_by_one() -> None:
    parameters = Parameters({"layer": {"U": Spec((2, 3)), "W": Spec((4,)), "b": Spec((5,), decay=False)}})
    (matrices, of), _ = LARS(LR).rules()
    assert parameters.runs(of, apart=matrices.layerwise) == [slice(0, 6), slice(6, 10)]
    assert parameters.runs(of) == [slice(0, 10)]


def test_without_trust_and_decay_lamb_is_adam_but_for_where_epsilon_stands() -> None:
    rng, plain = np.random.default_rng(0), LAMB(LR).rules()[1][0]
    p = [rng.standard_normal(50) for _ in range(2)]
    p[1][:] = p[0]
    states = [rule.new_state(50, np.float64) for rule in (plain, OPTIMIZERS["adam"](LR))]
    for t in range(1, 5):
        g = 100 * rng.standard_normal(50)
        for vector, rule, state in zip(p, (plain, OPTIMIZERS["adam"](LR)), states, strict=True):
            rule.step(vector, g, rule.numbers(t), *state.values())
    np.testing.assert_allclose(p[0], p[1], rtol=1e-4)


def test_each_name_of_the_command_line_is_an_optimizer() -> None:
    from distconv import config

    assert sorted(config.OPTIMIZERS) == sorted(ALL_OPTIMIZERS)


@pytest.mark.parametrize("most", [3.0, 1e6])
def test_a_long_gradient_becomes_as_long_as_it_may_be(gpu: Gpu, most: float) -> None:
    rng = np.random.default_rng(0)
    gradients = [rng.standard_normal(n).astype(np.float32) for n in (1000, 3, 256)]
    whole = math.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in gradients))
    for kernels in (Cpu(), gpu):
        for finite in (False, True):  # in this order: what is not finite changes nothing
            there = [kernels.device.upload(g.copy()) for g in gradients]
            bad = kernels.device.upload(np.int32([FINITE, FINITE if finite else 7]))
            kernels.clip(there, most, bad)
            for before, after in zip(gradients, map(kernels.device.download, there), strict=True):
                factor = min(1.0, most / whole) if finite else 1.0
                np.testing.assert_allclose(after, before * factor, rtol=1e-6)
