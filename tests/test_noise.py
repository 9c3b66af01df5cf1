"""The gradient noise scale: the estimator against gradients whose noise is known, and what it says to people."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distconv.data.shard import split
from distconv.kernels.cpu.updates import norm, squared_norm
from distconv.run.noise import MOMENTS, advice, estimate, moments, over_a_run, relative_steps, scale_of, steps_of_a_look

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


def summed(looks: np.ndarray) -> list[float]:
    """looks (n, 2): estimates of S and |G|² -> what `scale_of` takes."""
    return [sum(column) for column in zip(*(moments(*look) for look in looks.tolist()), strict=True)]


def test_the_scale_is_the_quotient_or_says_why_there_is_none() -> None:
    assert scale_of(summed(np.array([[8.0, 0.011], [10.0, 0.009]])))[0] == pytest.approx(900)
    assert np.isnan(scale_of([0.0] * MOMENTS)).all()
    assert np.isnan(scale_of(summed(np.zeros((5, 2))))).all()
    unseen, error = scale_of(summed(np.array([[9.0, -0.1], [9.0, 0.05]])))
    assert unseen == math.inf and math.isnan(error)
    one, error = scale_of(summed(np.array([[9.0, 0.01]])))
    assert one == pytest.approx(900) and math.isnan(error)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_error_is_how_far_the_scales_of_many_runs_are_apart(sizes: list[int]) -> None:
    rng, n, B = np.random.default_rng(0), 50, sum(sizes)
    G, deviation, runs, looks = rng.standard_normal(n) / 3, rng.random(n) * 3, 300, 40

    def run() -> tuple[float, float]:
        steps = [G + deviation * rng.standard_normal((B, n)) for _ in range(looks)]
        return scale_of(summed(np.array([estimate(*contributions(step, sizes)) for step in steps])))

    scales, errors = np.transpose([run() for _ in range(runs)])
    truth = float(deviation @ deviation) / float(G @ G)
    assert scales.std() / truth < 0.3  # a small error, as the formula is one of first order
    assert np.median(errors) == pytest.approx(scales.std() / truth, rel=0.2)


def epochs(scales: Sequence[float | None], errors: Sequence[float | None]) -> list[dict[str, float | None]]:
    return [{"noise_scale": s, "noise_scale_error": e} for s, e in zip(scales, errors, strict=True)]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.integers(1, 5000), st.integers(1, 5000))
def test_that_of_a_run_gives_the_steps_of_all_its_epochs(scales: list[float], batch_size: int, other: int) -> None:
    # Each epoch's way, in steps without noise, and how many steps of the other batch size that is.
    steps = sum((1 + scale / other) / (1 + scale / batch_size) for scale in scales)
    wanted = steps / len(scales)
    found, _ = over_a_run(epochs(scales, [0.1] * len(scales)), batch_size)
    assert relative_steps(found, other, batch_size) == pytest.approx(wanted, rel=1e-6)


@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats(0, 1)), min_size=1, max_size=9), st.integers(1, 5000))
def test_the_error_of_a_run_is_that_of_its_epochs_carried_on(known: list[tuple[float, float]], batch_size: int) -> None:
    scales, errors = np.transpose(known)
    scale, error = over_a_run(epochs(scales.tolist(), errors.tolist()), batch_size)
    moved = []  # how far the run's moves, in shares of it, as each epoch's moves by a thousandth of its error
    for epoch in range(len(known)):
        others = scales.copy()
        others[epoch] *= 1 + errors[epoch] / 1000
        moved.append((over_a_run(epochs(others.tolist(), errors.tolist()), batch_size)[0] / scale - 1) * 1000)
    assert error == pytest.approx(math.hypot(*moved), rel=0.01, abs=1e-6)


def test_epochs_that_were_not_told_do_not_count_and_those_that_got_nowhere_do() -> None:
    known = {"noise_scale": 300.0, "noise_scale_error": 0.1}
    assert over_a_run([{}, known], 100) == pytest.approx((300, 0.1))
    scale, error = over_a_run([known, {"noise_scale": None, "noise_scale_error": None}], 100)
    assert scale == pytest.approx(700)  # 1/4 of a step for every two
    assert error == pytest.approx(0.1 * (1 / 4) * (3 / 4) / (1 / 4) * 800 / 700)
    for nothing in ([], [{}], [{"noise_scale": None}]):
        assert np.isnan(over_a_run(nothing, 100)).all()
    assert np.isnan(over_a_run([known], 0)).all()
    assert over_a_run([{"noise_scale": 1e308, "noise_scale_error": 0.1}], 100) == pytest.approx((1e308, 0.1))
    before = over_a_run([{"noise_scale": 300.0}], 100)  # as versions wrote it that knew no error
    assert before[0] == pytest.approx(300) and math.isnan(before[1])


@pytest.mark.parametrize(
    ("samples", "steps_of_an_epoch", "every"),
    [(1000, 600, 1), (100, 600, 1), (50, 600, 2), (12.5, 600, 8), (0.5, 600, 60), (12.5, 29, 2), (12.5, 3, 1)],
)
def test_small_contributions_are_looked_at_in_fewer_steps(samples: float, steps_of_an_epoch: int, every: int) -> None:
    assert steps_of_a_look(samples, steps_of_an_epoch) == every


def test_small_batches_halve_the_steps_and_large_ones_save_none() -> None:
    assert relative_steps(900, 900, 450) == pytest.approx(2 / 3)
    assert relative_steps(1e9, 200, 100) == pytest.approx(1 / 2, rel=1e-6)
    assert relative_steps(1e-9, 200, 100) == pytest.approx(1)


def test_the_advice_weighs_a_larger_batch_against_the_same() -> None:
    text = advice(903.3, 0.07, 100, 2, step_seconds=0.05, compute_seconds=0.04)
    assert text.startswith(
        "gradient noise scale 900 images (± 7%): batches of 200 would need 45% fewer steps than of 100 (91%"
    )
    assert text.endswith("then 4 ranks would be up to 1.82 times as fast as 2, with the same batch 1.67 times")
    for unknown in (math.nan, math.inf, -3.0, 0.0):
        assert advice(unknown, 0.1, 100, 2, 0.05, 0.04) == ""
    assert advice(900, math.nan, 100, 2, 0.05, 0.04).startswith("gradient noise scale 900 images: batches")


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
