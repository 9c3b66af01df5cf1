"""What to try next: one sentence on what was learned and one on the time that it took, as the figures have it.

The first of the rules that applies speaks. Each says what was seen, and then what to do about it.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from distconv.run.noise import over_a_run, relative_steps
from distconv.run.report.history import History, Numbers

GAP = 0.01  # of accuracy, between training and test images, that is worth a word
SLOWER = 1.15  # times as long as the median rank: slow, not noisy
MUCH = 0.2  # of a step
FEW_STEPS = 20  # the first ones are slow, and fewer tell nothing of time


def advise(history: History) -> list[str]:
    """Two sentences at most."""
    return [sentence for sentence in (on_learning(history), on_time(history)) if sentence]


def on_learning(history: History) -> str:
    """From losses and scores."""
    skipped = int(np.nansum(history.steps("skipped")))
    if skipped:
        return (
            f"{_count(skipped, 'step')} had a gradient that was not finite: try a smaller --lr than "
            f"{history.settings.get('lr', 0.001):g}, or --clip-norm 1."
        )
    if history.status in ("stopped", "cut off", "failed"):
        done, planned = history.last_step, history.start.get("steps") or 0
        return f"It ended after step {done:,} of {planned:,}: the same command with the same --out goes on from there."
    test, train = (history.per_epoch(f"{part}_{history.metric}") for part in ("test", "train"))
    if history.metric != "accuracy" or not len(test) or not np.isfinite([test[-1], train[-1]]).all():
        return ""
    best, gap, wrong = int(np.nanargmax(test)), float(train[-1] - test[-1]), 1 - float(test[-1])
    if len(test) - best > 3 and test[best] - test[-1] > GAP / 2:
        return (
            f"The test accuracy was best after epoch {best + 1} ({test[best]:.2%}) and fell to {test[-1]:.2%}: hold "
            "images out by --validation and stop in time by --patience 3, or let the rate fall by --schedule one-cycle."
        )
    if gap > GAP and gap > wrong / 3:
        means = ["--augment"] * (not history.settings.get("augment"))
        means += ["--weight-decay 0.01"] * (not history.settings.get("weight_decay"))
        how = " or ".join(means) or "more training images, or a smaller network,"
        return (
            f"It knows the training images better than the test images ({train[-1]:.2%} to {test[-1]:.2%}): {how} "
            "would work against that."
        )
    rising = len(test) < 3 or test[-1] - test[-3] > 0.1 * (1 - test[-3])
    if rising and wrong > 0.002:
        return (
            f"The test accuracy was still rising at the end ({test[-1]:.2%} after {_count(len(test), 'epoch')}): give "
            f"more --epochs, {max(2, 2 * len(test))} say."
        )
    if history.settings.get("schedule", "constant") == "constant":
        return (
            f"The accuracy has settled at {test[-1]:.2%} at a constant learning rate: --schedule one-cycle lets it "
            "fall to 0, which mostly brings the last tenths."
        )
    return f"The accuracy has settled at {test[-1]:.2%}: several seeds together (--ensemble 4) mostly know some more."


def on_time(history: History) -> str:
    """From where the time of a step went."""
    if len(history.steps("step")) < FEW_STEPS:
        return ""
    compute, exchange, wait = (history.median(f"{part}_seconds") for part in ("compute", "exchange", "wait"))
    step, ranks, hosts = compute + exchange + wait, history.ranks, int(history.start.get("hosts") or 1)
    busy = rank_seconds(history)
    if len(busy) > 1 and busy.max() > SLOWER * np.median(busy):
        slow = int(np.argmax(busy))
        names = history.start.get("hostnames") or []
        where = f" on {names[slow]}" if slow < len(names) else ""
        return (
            f"Rank {slow}{where} takes {busy.max() / np.median(busy) - 1:.0%} longer for a step than the median rank, "
            "and all wait for it: see what else runs there."
        )
    if wait > MUCH * step:
        return (
            f"{wait / step:.0%} of a step of rank 0 is waiting: the ranks are not done at the same time, because they "
            "share cores or have unequal parts of the batch."
        )
    scale = noise_scale(history)
    larger = 2 * history.batch_size
    saved = 1 - relative_steps(scale, larger, history.batch_size) if 0 < scale < math.inf and larger else 0.0
    if exchange > MUCH * step and ranks > 1:
        how = "--wire int8 sends half as much" if hosts > 1 else "a larger --batch-size exchanges less often"
        return f"{exchange / step:.0%} of a step is exchange: {how}, if the accuracy stays."
    if saved > 0.25:
        return (
            f"The gradients are noisy (noise scale {scale:,.0f} images at batches of {history.batch_size:,}): batches "
            f"of {larger:,} would need {saved:.0%} fewer steps, and keep twice the ranks busy."
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if history.start.get("device") == "cpu" and ranks == 1 and cores > 1:
        return (
            f"{compute / step:.0%} of a step is computing, on one rank: mpirun -n {cores} shares it out among {cores}."
        )
    return f"{compute / step:.0%} of a step is computing: more ranks on cores of their own make it shorter."


def rank_seconds(history: History) -> Numbers:
    """(P,), the mean seconds of a step that each rank was busy in the last epoch; empty where that is not known."""
    found: Any = next((epoch["busy_seconds"] for epoch in reversed(history.epochs) if epoch.get("busy_seconds")), [])
    is_known = isinstance(found, list) and all(isinstance(seconds, int | float) for seconds in found)
    return np.array(found if is_known else [], np.float64)


def noise_scale(history: History) -> float:
    """Of the whole run, in images; NaN where it is not known."""
    scales = [math.inf if epoch["noise_scale"] is None else epoch["noise_scale"] for epoch in history.epochs
              if "noise_scale" in epoch]  # fmt: skip
    known = any(epoch.get("noise_scale") for epoch in history.epochs)
    return over_a_run(scales, history.batch_size) if known and history.batch_size else math.nan


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
