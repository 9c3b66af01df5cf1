"""The end of a run: its score on the whole test set, its pictures, and what people are told."""

from __future__ import annotations

import resource
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distconv import errors
from distconv.config import Config
from distconv.formatting import amount, percent, plural
from distconv.nn.optimizers import EMA
from distconv.nn.summary import drops_scores
from distconv.run import agreement
from distconv.run.files import write_text
from distconv.run.folder import BEST
from distconv.run.log import RunLog, describe_noise, describe_steps, read_metrics, steps_alike
from distconv.run.report.samples import ANSWERS, answer, save_samples
from distconv.run.run import Run
from distconv.tasks.classify import Classification

KIBIBYTE = 1024  # the unit of Linux's ru_maxrss


def finish(run: Run, out: Path, log: RunLog) -> int:
    """Final score on the whole test set, curves and DONE; exit code 1 where the target is missed."""
    run.world.at("evaluate", run.step)
    if run.best_epoch:
        early = (
            f"stopped early, after {plural(run.config.patience, 'epoch')} without a better one; "
            if run.out_of_patience
            else ""
        )
        log.say(
            f"{early}best on the validation set: epoch {run.best_epoch}, {run.task.metric} {percent(run.best_score)}, "
            f"kept in {out / BEST}"
        )
    averages = bool(run.config.ema)
    answers = answer(run)  # of averaged weights where there are such
    if answers is None:
        judged = run.measure("test", averaged=averages)
    else:
        judged = float(answers.correct), float(len(answers.labels))
    correct, total = run.measure("test") if averages else judged
    agreement.agree(run)  # nothing has changed while it was evaluated
    metric = run.task.metric
    final = {
        "step": run.step,
        "metric": metric,
        f"test_{metric}": correct / total if total else float("nan"),
        "correct": _whole(correct),
        "total": _whole(total),
    }
    if averages:
        final[f"{EMA}_test_{metric}"] = judged[0] / total if total else float("nan")
    with run.world.together():
        if run.world.rank == 0 and answers:
            save_samples(out / ANSWERS, run, answers)  # before the record of the end, after which a report has all
    final["peak_memory_bytes"] = KIBIBYTE * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    log.write("final", **final, parameters_sha256=run.parameters.digest())
    log.close()
    run.world.at("end")
    with run.world.together():
        if run.world.rank == 0:
            metrics = read_metrics(out / "metrics.jsonl")
            draw(metrics, run, out, log)
            if steps := steps_alike(metrics):
                log.say(describe_steps(steps, run.world.size))
                images = min(run.config.step_size, run.data.size("train"))
                if line := describe_noise(metrics, images, run.world.size):
                    log.say(line)
            write_text(out / "DONE", f"{run.step}\n")
    show_report(run, out, log)
    return conclude(final, run.config, out, log)


def conclude(final: Mapping[str, Any], settings: Config, out: Path, log: RunLog) -> int:
    """Say how good the model of a finished run is; exit code 1 where it, averaged if it is, misses the target."""
    metric = final.get("metric", "accuracy")  # older runs tell no other
    score, averaged = final[f"test_{metric}"], final.get(f"{EMA}_test_{metric}")
    log.say(
        f"test {metric} {percent(score)} ({amount(final['correct'])} of {amount(final['total'])})"
        + (f", with averaged weights {percent(averaged)}" if averaged is not None else "")
        + f"; model, metrics and report.html are in {out}"
    )
    command = "evaluate" if metric == Classification.metric else "report"
    log.say(f"next: python -m distconv.{command} {shlex.quote(str(out))}")
    score = score if averaged is None else averaged
    # A user's own metric may be below 0, where nobody has set a target; and no score reaches one.
    missed = settings.target_accuracy > 0 and not score >= settings.target_accuracy
    if missed:
        log.say(f"the target {metric} {settings.target_accuracy:.2%} was missed")
    return int(missed)


def draw(metrics: Sequence[Mapping[str, Any]], run: Run, out: Path, log: RunLog) -> None:
    """The curves; a picture that cannot be drawn is told, and does not fail the run. Raises StorageError."""
    settings, data, notes = run.config, run.data, []
    name = next((record["data"] for record in reversed(metrics) if record.get("data")), settings.data)
    title = f"{settings.model} on {Path(str(name)).name}, {plural(run.world.size, 'rank')}"
    raised = ["dropout, of the scores too"] if drops_scores(run.replica.model) else []
    if settings.label_smoothing:
        raised.append(f"smoothed labels ({settings.label_smoothing:g})")
    if raised:
        notes.append(f"The loss is taken with {' and '.join(raised)}: it is higher than in evaluation.")
    if 0 < settings.eval_samples < max(data.size("train"), data.size("test")):
        notes.append(
            f"Scores after an epoch: of the first {settings.eval_samples:,} samples of each part, or all; in the end: "
            f"of all {data.size('test'):,} test samples."
        )
    try:
        from distconv.pictures.curves import draw_curves  # Matplotlib, which rank 0 alone needs, at the end
        from distconv.pictures.style import save

        save(draw_curves(metrics, title, notes), out / "curves.png")
    except OSError as error:
        raise errors.StorageError(f"{out / 'curves.png'} cannot be written: {error}") from None
    except Exception as error:  # Matplotlib's own, of many kinds
        log.say(f"the curves could not be drawn ({textwrap.shorten(str(error), 200)})")


def show_report(run: Run, out: Path, log: RunLog, failure: str = "") -> None:
    """Write the page about the run; what cannot be shown is told, and does not fail the run. failure: what ended it."""
    if run.world.rank == 0:
        try:
            from distconv.run.report.page import PAGE, write_report

            write_report([out], out / PAGE, failure)
        except Exception as error:  # a page is worth less than the run that it tells of
            log.say(f"report.html could not be written ({textwrap.shorten(str(error), 200)})")


def _whole(number: float) -> float | int:
    """A count is written as one; what a user's own task adds up may be none."""
    return int(number) if number.is_integer() else number
