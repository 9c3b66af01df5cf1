"""The gradient noise scale: the estimator against gradients whose noise is known, and what it says to people."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distconv.data.shard import split
from distconv.kernels.cpu.updates import norm, squared_norm
from distconv.run.noise import advice, estimate, over_a_run, relative_steps, scale_of

SIZES = ([50, 50], [13, 12, 13, 12, 13, 12, 13, 12], [90, 0, 9, 1])


def contributions(gradients: np.ndarray, sizes: list[int]) -> tuple[np.ndarray, np.ndarray, float]:
    """What a step knows of its samples' gradients (B, n), shared out in these sizes."""
    B, ends = len(gradients), np.cumsum(sizes)
    vectors = [gradients[end - size : end].sum(axis=0) / B for size, end in zip(sizes, ends, strict=True)]
    squares = np.array([vector @ vector for vector in vectors])
    whole = np.sum(vectors, axis=0)
    return squares, np.array(sizes), float(whole @ whole)


@pytest.mark.parametrize("sizes", SIZES)
def test_noise_and_signal_are_found_however_the_samples_are_spread(sizes: list[int]) -> None:
    rng, n, B = np.random.default_rng(0), 200, sum(sizes)
    G, deviation = rng.standard_normal(n) / 10, rng.random(n) * 3
    S, signal = float(deviation @ deviation), float(G @ G)
    steps = [estimate(*contributions(G + deviation * rng.standard_normal((B, n)), sizes)) for _ in range(2000)]
    (found_noise, found_signal), errors = np.mean(steps, axis=0), np.std(steps, axis=0) / math.sqrt(len(steps))
    assert max(errors[0] / S, errors[1] / signal) < 0.05  # so the next lines say something
    assert abs(found_noise - S) < 4 * errors[0]
    assert abs(found_signal - signal) < 4 * errors[1]


def test_equal_contributions_give_the_formula_of_the_paper() -> None:
    squares, samples, whole = contributions(np.random.default_rng(1).standard_normal((40, 7)), [10] * 4)
    small, large = squares.mean() * 4**2, whole  # of the mean gradients of 10 and of 40 samples
    wanted = (small - large) / (1 / 10 - 1 / 40), (40 * large - 10 * small) / (40 - 10)
    assert estimate(squares, samples, whole) == pytest.approx(wanted)


@given(st.integers(2, 9), st.integers(2, 40), st.integers(0, 999))
def test_noise_is_never_negative_and_that_of_single_samples_is_their_variance(V: int, B: int, seed: int) -> None:
    gradients = np.random.default_rng(seed).standard_normal((B, 3))
    sizes = [part.stop - part.start for part in (split(B, V, v) for v in range(V))]
    noise, signal = estimate(*contributions(gradients, sizes))
    assert noise >= -1e-9
    if V >= B:  # a sample each: the variance that statistics books define
        assert noise == pytest.approx(gradients.var(axis=0, ddof=1).sum())
        assert signal == pytest.approx((gradients.mean(axis=0) ** 2).sum() - noise / B)


@pytest.mark.parametrize(
    ("squares", "samples", "whole"),
    [([4.0], [7], 4.0), ([4.0, 0.0], [7, 0], 4.0), ([math.inf, 1.0], [1, 1], 1.0), ([1e308, 1e308], [1, 9], math.nan)],
)
def test_a_step_that_cannot_tell_gives_nan(squares: list[float], samples: list[int], whole: float) -> None:
    assert np.isnan(estimate(np.array(squares), np.array(samples), whole)).all()


def test_the_scale_is_the_quotient_or_says_why_there_is_none() -> None:
    assert scale_of(9.0, 0.01) == pytest.approx(900)
    assert math.isnan(scale_of(0.0, 0.0)) and math.isnan(scale_of(math.nan, 1.0))
    assert scale_of(9.0, -0.1) == math.inf


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.integers(1, 5000), st.integers(1, 5000))
def test_that_of_a_run_gives_the_steps_of_all_its_epochs(scales: list[float], batch_size: int, other: int) -> None:
    # Each epoch's way, in steps without noise, and how many steps of the other batch size that is.
    steps = sum((1 + scale / other) / (1 + scale / batch_size) for scale in scales)
    wanted = steps / len(scales)
    assert relative_steps(over_a_run(scales, batch_size), other, batch_size) == pytest.approx(wanted, rel=1e-6)


def test_epochs_that_saw_nothing_do_not_count_and_those_that_got_nowhere_do() -> None:
    assert over_a_run([math.nan, 300.0], 100) == pytest.approx(300)
    assert over_a_run([300.0, math.inf], 100) == pytest.approx(700)  # 1/4 of a step for every two
    assert math.isnan(over_a_run([math.nan], 100)) and over_a_run([math.inf], 100) == math.inf


def test_small_batches_halve_the_steps_and_large_ones_save_none() -> None:
    assert relative_steps(900, 900, 450) == pytest.approx(2 / 3)
    assert relative_steps(1e9, 200, 100) == pytest.approx(1 / 2, rel=1e-6)
    assert relative_steps(1e-9, 200, 100) == pytest.approx(1)


def test_the_advice_weighs_a_larger_batch_against_the_same() -> None:
    text = advice(903.3, 100, 2, step_seconds=0.05, compute_seconds=0.04)
    assert text.startswith(
        "gradient noise scale 900 images: batches of 200 would need 45% fewer steps than of 100 (91%"
    )
    assert text.endswith("then 4 ranks would be up to 1.82 times as fast as 2, with the same batch 1.67 times")
    for unknown in (math.nan, math.inf, -3.0, 0.0):
        assert advice(unknown, 100, 2, 0.05, 0.04) == ""


# squared_norm


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 63, 64, 1000, 123_552])
def test_the_squared_norm_is_that_of_float64_in_the_order_that_it_tells(dtype: type, n: int) -> None:
    x = np.random.default_rng(n).standard_normal(n).astype(dtype)
    squares = np.append(x.astype(np.float64) ** 2, np.zeros(-n % 64)).reshape(-1, 64)
    total = 0.0
    for lane in np.add.accumulate(np.vstack([np.zeros(64), squares]))[-1]:
        total += lane
    assert squared_norm(x) == total  # all bits, whatever the processor's vectors hold
    assert squared_norm(x) == pytest.approx(float(np.sum(x.astype(np.float64) ** 2)), rel=1e-12)


def test_numbers_whose_squares_float32_cannot_hold_have_a_length() -> None:
    for number in (1e25, 1e-30):
        assert norm(np.full(4, number, np.float32)) == pytest.approx(2 * number, rel=1e-6)
