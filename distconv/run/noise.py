"""The gradient noise scale: how far a larger batch would save steps (McCandlish et al. 2018, arXiv 1812.06162).

The gradient of one sample is G, that of all samples, and noise whose variance, summed over the parameters, is S; that
of b samples has S / b. The gradients that the ranks, or virtual shards, contribute to a step differ by this noise, so
what the step needs anyway tells S and |G|². Their quotient is the noise scale, in samples: far below it a batch of
twice the size needs half the steps, far above it as many as before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOMENTS = 6
SAMPLES_OF_A_LOOK = 100
LOOKS_OF_AN_EPOCH = 10  # or all of its steps, if it has fewer


def steps_of_a_look(samples: float, steps: int) -> int:
    """In every which step to look at the norms, where a contribution has so many samples, and an epoch so many steps.

    Norms take as long for few samples as for many. With one look for so many samples, they take at most 0.3 % of a step
    of deepconvnet.
    """
    return max(1, min(math.ceil(SAMPLES_OF_A_LOOK / samples), steps // LOOKS_OF_AN_EPOCH))


def estimate(
    squared_norms: NDArray[np.float64], samples: NDArray[np.int64], squared_norm_of_sum: float
) -> tuple[float, float]:
    """Estimates of S and |G|² from one step, right on average; `scale_of` divides sums of both over many steps.

    squared_norms (V,): of each contribution, its samples' gradients added up and divided by the size B of the whole
    batch; squared_norm_of_sum: of the contributions' sum, the gradient g of the step. samples (V,) add up to B; a
    contribution of none does not count. Both are nan for fewer than two that count, and where a norm is not finite.

    With g_v, the mean gradient of b_v samples, sum b_v |g_v - g|² = sum b_v |g_v|² - B |g|² is (V - 1) S on average,
    however unevenly the samples are spread, and |g|² is |G|² + S / B. For equal b_v, these are the estimators of the
    paper's appendix A.1.
    """
    sizes = samples.tolist()
    B, V = sum(sizes), sum(size > 0 for size in sizes)
    if V < 2:
        return math.nan, math.nan
    between = sum(norm * (B / size) for norm, size in zip(squared_norms.tolist(), sizes, strict=True) if size)
    noise = B * (between - squared_norm_of_sum) / (V - 1)
    if not math.isfinite(noise):
        return math.nan, math.nan
    return noise, squared_norm_of_sum - noise / B


def moments(noise: float, signal: float) -> tuple[float, ...]:
    """What is summed over the steps that are looked at, of the estimates of S and |G|² from one: MOMENTS numbers."""
    return 1.0, noise, signal, noise * noise, noise * signal, signal * signal


def scale_of(sums: Sequence[float]) -> tuple[float, float]:
    """The noise scale S / |G|² in samples, and its standard error as a share of it.

    sums (MOMENTS,): of `moments`. The scale is nan where there are none, inf where the noise leaves nothing to be seen
    of G. The error is that of a ratio of means, to first order (the delta method); nan where it is not known.
    """
    count, noise, signal, noise_squared, both, signal_squared = sums
    if noise == signal == 0:
        return math.nan, math.nan
    if signal <= 0:
        return math.inf, math.nan
    if count < 2 or noise <= 0:
        return noise / signal, math.nan
    # Times the count, the mean square of how far S / mean S and |G|² / mean |G|² of a step are apart.
    apart = noise_squared / noise / noise - 2 * both / noise / signal + signal_squared / signal / signal
    return noise / signal, math.sqrt(max(0.0, apart) * count / (count - 1))


def over_a_run(epochs: Iterable[Mapping[str, Any]], batch_size: int) -> tuple[float, float]:
    """The noise scale that, if it had been the same all the time, would have made a run as long as it was.

    And its standard error, as a share of it. epochs: their records, as metrics.jsonl has them, where null is infinity;
    both are nan if none has a number. The scale grows many times over while a model learns, so that of the last epoch
    would promise too much of larger batches. A step gets as far as 1 / (1 + scale / batch size) steps without noise, of
    which the run has taken the sum.
    """
    told = [epoch for epoch in epochs if "noise_scale" in epoch]
    seen = [epoch for epoch in told if epoch["noise_scale"] is not None]
    if not seen or not batch_size:
        return math.nan, math.nan
    steps = [1 / (1 + epoch["noise_scale"] / batch_size) for epoch in seen]
    way, length = sum(steps), len(told)
    # The error of such a step is step (1 - step) times that of the scale; how far one is from 0 is not known.
    errors = [math.nan if (error := epoch.get("noise_scale_error")) is None else error for epoch in seen]
    error = math.hypot(*(step * (1 - step) * error for step, error in zip(steps, errors, strict=True)))
    scale = batch_size * (length - way) / way
    return scale, error * length / way / (length - way) if scale else math.nan


def relative_steps(noise_scale: float, batch_size: float, reference: float) -> float:
    """By how much batches of another size multiply the steps that those of the reference size need.

    Steps go with 1 + noise scale / batch size, as the paper's equation 2.7 has it, if the learning rate suits each.
    """
    return (1 + noise_scale / batch_size) / (1 + noise_scale / reference)


def steps_needed(steps: float, noise_scale: float, batch_size: int, reference: int) -> int:
    """How many steps of batch_size bring a model as far as so many `steps` of the reference size."""
    more = steps * relative_steps(noise_scale, batch_size, reference)
    return math.ceil(round(more, 6))  # 400.0000001 is 400


def advice(
    noise_scale: float, error: float, batch_size: int, ranks: int, step_seconds: float, compute_seconds: float
) -> str:
    """What twice the batch and twice the ranks would bring, for people; nothing where the noise scale is not known.

    error: of the noise scale, as a share of it; may be nan. step_seconds, compute_seconds: of a whole step and of its
    gradient on these ranks. What the step does besides is taken to last no longer on twice the ranks, which is the best
    that can be.
    """
    if not 0 < noise_scale < math.inf or not 0 < compute_seconds <= step_seconds:
        return ""
    steps = relative_steps(noise_scale, 2 * batch_size, batch_size)
    with_the_same_batch = step_seconds / (step_seconds - compute_seconds / 2)
    known_to = "" if math.isnan(error) else f" (± {error:.0%})"
    return (
        f"gradient noise scale {float(f'{noise_scale:.2g}'):,.15g} images{known_to}: batches of {2 * batch_size:,} "
        f"would need {1 - steps:.0%} fewer steps than of {batch_size:,} ({0.5 / steps:.0%} efficiency), if the "
        f"learning rate suits them; then {2 * ranks} ranks would be up to {1 / steps:.2f} times as fast as {ranks}, "
        f"with the same batch {with_the_same_batch:.2f} times"
    )
