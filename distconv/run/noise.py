"""The gradient noise scale: how far a larger batch would save steps (McCandlish et al. 2018, arXiv 1812.06162).

The gradient of one sample is G, that of all samples, and noise whose variance, summed over the parameters, is S; that
of b samples has S / b. The gradients that the ranks, or virtual shards, contribute to a step differ by this noise, so
what the step needs anyway tells S and |G|². Their quotient is the noise scale, in samples: far below it a batch of
twice the size needs half the steps, far above it as many as before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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


def scale_of(noise: float, signal: float) -> float:
    """The noise scale S / |G|² in samples, from sums of estimates over the same steps.

    nan where there were none, inf where the noise leaves nothing to be seen of G.
    """
    if math.isnan(noise + signal) or noise == signal == 0:
        return math.nan
    return noise / signal if signal > 0 else math.inf


def over_a_run(noise_scales: Sequence[float], batch_size: int) -> float:
    """The noise scale that, if it had been the same all the time, would have made a run as long as it was.

    noise_scales (E,): of its epochs; those that are nan do not count. It grows many times over while a model learns, so
    that of the last epoch would promise too much of larger batches. A step gets as far as 1 / (1 + noise scale / batch
    size) steps without noise, of which the run has taken the sum.
    """
    steps = [1 / (1 + scale / batch_size) for scale in noise_scales if scale >= 0]
    if not steps:
        return math.nan
    return batch_size * (len(steps) / sum(steps) - 1) if any(steps) else math.inf


def relative_steps(noise_scale: float, batch_size: float, reference: float) -> float:
    """By how much batches of another size multiply the steps that those of the reference size need.

    Steps go with 1 + noise scale / batch size, as the paper's equation 2.7 has it, if the learning rate suits each.
    """
    return (1 + noise_scale / batch_size) / (1 + noise_scale / reference)


def advice(noise_scale: float, batch_size: int, ranks: int, step_seconds: float, compute_seconds: float) -> str:
    """What twice the batch and twice the ranks would bring, for people; nothing where the noise scale is not known.

    step_seconds, compute_seconds: of a whole step and of its gradient on these ranks. What the step does besides is
    taken to last no longer on twice the ranks, which is the best that can be.
    """
    if not 0 < noise_scale < math.inf or not 0 < compute_seconds <= step_seconds:
        return ""
    steps = relative_steps(noise_scale, 2 * batch_size, batch_size)
    with_the_same_batch = step_seconds / (step_seconds - compute_seconds / 2)
    return (
        f"gradient noise scale {float(f'{noise_scale:.2g}'):,.15g} images: batches of {2 * batch_size:,} would need "
        f"{1 - steps:.0%} fewer steps than of {batch_size:,} ({0.5 / steps:.0%} efficiency), if the learning rate "
        f"suits them; then {2 * ranks} ranks would be up to {1 / steps:.2f} times as fast as {ranks}, with the same "
        f"batch {with_the_same_batch:.2f} times"
    )
