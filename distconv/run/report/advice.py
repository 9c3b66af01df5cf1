"""What to try next: one sentence on what was learned and one on the time that it took, as the figures have it.

The first of the rules that applies speaks. Each says what was seen, and then what to do about it.
"""

from __future__ import annotations

import math

import numpy as np

from distconv.formatting import duration, plural
from distconv.run.noise import over_a_run, relative_steps
from distconv.run.report.history import History, Numbers

GAP = 0.01  # of accuracy, between training and test images, that is worth a word
FEW_IMAGES = 5  # by which scores may differ by chance
SLOWER = 1.2  # times as long as the median of the others: slow, not noisy
MUCH = 0.2  # of a step
CROWDED = 3  # times as long as the exchange by itself
WORTH_IT = 0.25  # of the steps
FEW_EPOCHS = 3
INT8 = {"float16": "half", "float32": "a quarter", "float64": "an eighth"}  # of the bytes of these
FEW_STEPS = 20  # the first ones are slow, and fewer tell nothing of time


def advise(history: History) -> list[str]:
    """Two sentences at most."""
    return [sentence for sentence in (on_learning(history), on_time(history)) if sentence]


def on_learning(history: History) -> str:
    """From losses and scores."""
    skipped, planned = int(np.nansum(history.steps("skipped"))), history.start.get("steps") or 0
    if skipped:
        clip = ", or --clip-norm 1" * (not history.settings.get("clip_norm"))
        return (
            f"{plural(skipped, 'step')} had a gradient that was not finite: try a smaller --lr than "
            f"{history.settings.get('lr', 0.001):g}{clip}."
        )
    if history.status == "running":
        left = (planned - history.last_step) * history.step_seconds
        rest = "" if math.isnan(left) else f", and about {duration(left)} of training are left"
        return f"It is running: {history.last_step:,} of {planned:,} steps are done{rest}."
    came = f"It ended after step {history.last_step:,} of {planned:,}"
    if history.status == "failed":  # the same command may well fail again, as the training repeats to the bit
        return (
            f"{came} by the failure that is told above: when its cause is mended, the command with the same --out goes "
            "on from the last good checkpoint, if there is one."
        )
    if history.status != "finished":
        there = "" if history.status == "stopped" else ", if there is one"
        return f"{came}: the same command with the same --out goes on from its last checkpoint{there}."
    test, train = history.per_epoch(f"{history.judged}_{history.metric}"), history.per_epoch(f"train_{history.metric}")
    if history.metric != "accuracy" or not len(test) or not np.isfinite([*test, *train]).all():
        return ""
    best, epochs = int(np.argmax(test)), len(test)
    if history.last_step < planned and history.settings.get("patience"):
        return (
            f"It stopped early, by --patience, after {plural(epochs, 'epoch')}: best.safetensors has the best of "
            "them by the validation set, which evaluate takes, too."
        )
    if history.score == 1:  # nothing brings more
        return ""
    if epochs < FEW_EPOCHS:
        tell = f"{plural(epochs, 'epoch')} tell{'s' * (epochs == 1)} little"
        return f"{tell}: --epochs 10 would show whether more is to be had."
    if epochs - best > FEW_EPOCHS and test[best] - test[-1] > max(GAP / 2, _by_chance(history)):
        means = ["hold images out by --validation and stop in time by --patience 3"] * (
            not history.settings.get("patience")
        )
        means += ["let the rate fall by --schedule one-cycle"] * _is_constant(history)
        how = ", or ".join(means) or "try a smaller --lr"
        return (
            f"The test accuracy was best after epoch {best + 1} ({test[best]:.2%}) and fell to {test[-1]:.2%}: {how}."
        )
    return _on_the_end(history, test, train)


def _on_the_end(history: History, test: Numbers, train: Numbers) -> str:
    """Of a finished run: whether it learned by heart, was still learning, or has settled."""
    gap, wrong = float(train[-1] - test[-1]), 1 - float(test[-1])
    if gap > max(GAP, _by_chance(history), wrong / 3):
        means = ["--augment"] * (not history.settings.get("augment"))
        means += ["--weight-decay 0.01"] * (not history.settings.get("weight_decay"))
        how = " or ".join(means) or "more training images, or a smaller network,"
        return (
            f"It knows the training images better than the test images ({train[-1]:.2%} to {test[-1]:.2%}): {how} "
            "would work against that."
        )
    if test[-1] > test[-2] and test[-1] - test[-3] > max(0.1 * (1 - test[-3]), _by_chance(history)):
        return (
            f"The test accuracy was still rising at the end ({test[-1]:.2%} after {plural(len(test), 'epoch')}): give "
            f"more --epochs, {2 * len(test)} say."
        )
    if _is_constant(history):
        return (
            f"The test accuracy came to {history.score:.2%} at a constant learning rate: --schedule one-cycle lets it "
            "fall to 0, which mostly brings some more."
        )
    return (
        f"The test accuracy came to {history.score:.2%}: several seeds together (--ensemble 4) mostly know some more."
    )


def _by_chance(history: History) -> float:
    """A difference of scores that tells nothing, of so few images after each epoch."""
    images, scored = history.start.get("test_images") or math.inf, history.settings.get("eval_samples") or math.inf
    return FEW_IMAGES / min(images, scored)


def _is_constant(history: History) -> bool:
    return bool(history.settings.get("schedule", "constant") == "constant")


def on_time(history: History) -> str:
    """From where the time of a step went."""
    if len(history.steps_of_now("step")) < FEW_STEPS:
        return ""
    compute, exchange, wait = (history.median(f"{part}_seconds") for part in ("compute", "exchange", "wait"))
    step, ranks, hosts = history.step_seconds, history.ranks, int(history.start.get("hosts") or 1)
    if slow := _slow_rank(history):
        return slow
    if wait > MUCH * step:
        return (
            f"{wait / step:.0%} of a step of rank 0 is waiting: the ranks are not done at the same time, because they "
            "share cores or have unequal parts of the batch."
        )
    alone = history.median("wire_seconds_float32")
    if exchange > MUCH * step and ranks > 1 and exchange > CROWDED * alone:
        return (
            f"{exchange / step:.0%} of a step is exchange, {1e3 * exchange:.3g} ms, though the same numbers in float32 "
            f"took {1e3 * alone:.3g} ms by themselves: the ranks lack cores, not a faster wire."
        )
    if exchange > MUCH * step and ranks > 1:
        share = INT8.get(str(history.start.get("wire")), "") if hosts > 1 else ""
        how = f"--wire int8 sends {share} as much" if share else "a larger --batch-size exchanges less often"
        return f"{exchange / step:.0%} of a step is exchange: {how}, if the accuracy stays."
    scale, _ = over_a_run(history.epochs, history.batch_size)
    larger = 2 * history.batch_size
    saved = 1 - relative_steps(scale, larger, history.batch_size) if 0 < scale < math.inf and larger else 0.0
    if saved > WORTH_IT:
        return (
            f"The gradients are noisy (noise scale {scale:,.0f} images at batches of {history.batch_size:,}): batches "
            f"of {larger:,} would need {saved:.0%} fewer steps, and keep twice the ranks busy."
        )
    if ranks == 1:
        return f"{compute / step:.0%} of a step is computing, on one rank: mpirun -n 2 shares it out."
    return f"{compute / step:.0%} of a step is computing: more ranks on cores of their own make it shorter."


def _slow_rank(history: History) -> str:
    """Whether one rank keeps the others waiting."""
    if len(history.rank_seconds) < 2:
        return ""
    busy = history.rank_seconds[:, -1]
    slow, names = int(np.argmax(busy)), history.start.get("hostnames") or []
    others = float(np.median(np.delete(busy, slow)))
    if busy[slow] <= SLOWER * others:
        return ""
    where = f" on {names[slow]}" if slow < len(names) else ""
    return (
        f"Rank {slow}{where} is busy {busy[slow] / others - 1:.0%} longer in a step than the others, and all wait for "
        "it: see what else runs there."
    )
