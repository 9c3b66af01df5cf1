"""The end of a run: its score on the whole test set, its pictures, and what people are told."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distconv import errors
from distconv.config import Config
from distconv.nn.optimizers import EMA
from distconv.run import agreement
from distconv.run.folder import BEST
from distconv.run.log import RunLog, describe_noise, describe_steps, read_metrics, write_text
from distconv.run.run import Run


def finish(run: Run, out: Path, log: RunLog) -> int:
    """Final score on the whole test set, curves and DONE; exit code 1 where the target is missed."""
    run.world.at("evaluate", run.step)
    if run.best_epoch:
        early = (
            f"stopped early, after {run.config.patience} epochs without a better one; " if run.out_of_patience else ""
        )
        log.say(
            f"{early}best on the validation set: epoch {run.best_epoch}, {run.task.metric} {run.best_score:.2%}, kept "
            f"in {out / BEST}"
        )
    correct, total = (int(number) if number.is_integer() else number for number in run.measure("test"))
    averaged = run.measure("test", averaged=True)[0] if run.config.ema else None
    agreement.agree(run)  # nothing has changed while it was evaluated
    score = correct / total if total else float("nan")
    metric = run.task.metric
    final = {"step": run.step, "metric": metric, f"test_{metric}": score, "correct": correct, "total": total}
    if averaged is not None:
        final[f"{EMA}_test_{metric}"] = averaged / total if total else float("nan")
    log.write("final", **final, parameters_sha256=run.parameters.digest())
    log.close()
    run.world.at("end")
    with run.world.together():
        if run.world.rank == 0:
            metrics = read_metrics(out / "metrics.jsonl")
            draw(metrics, run, out, log)
            if steps := [record for record in metrics if record.get("event") == "step"]:
                log.say(describe_steps(steps, run.world.size))
                if line := describe_noise(metrics, run.config.step_size, run.world.size):
                    log.say(line)
            write_text(out / "DONE", f"{run.step}\n")
    return conclude(final, run.config, out, log)


def conclude(final: Mapping[str, Any], settings: Config, out: Path, log: RunLog) -> int:
    """Say how good the model of a finished run is; exit code 1 where it, averaged if it is, misses the target."""
    metric = final.get("metric", "accuracy")  # older runs tell no other
    score, averaged = final[f"test_{metric}"], final.get(f"{EMA}_test_{metric}")
    log.say(
        f"test {metric} {score:.2%} ({final['correct']:,} of {final['total']:,})"
        + (f", with averaged weights {averaged:.2%}" if averaged is not None else "")
        + f"; model, metrics and curves are in {out}"
    )
    score = score if averaged is None else averaged
    missed = score < settings.target_accuracy
    if missed:
        log.say(f"the target {metric} {settings.target_accuracy:.2%} was missed")
    return int(missed)


def draw(metrics: Sequence[Mapping[str, Any]], run: Run, out: Path, log: RunLog) -> None:
    """The curves; a picture that cannot be drawn is told, and does not fail the run. Raises StorageError."""
    title = f"{run.config.model} on {run.world.size} rank{'s' * (run.world.size > 1)}"
    try:
        from distconv.pictures.curves import draw_curves  # Matplotlib, which rank 0 alone needs, at the end

        draw_curves(metrics, title, out / "curves.png")
    except OSError as error:
        raise errors.StorageError(f"{out / 'curves.png'} cannot be written: {error}") from None
    except Exception as error:  # Matplotlib's own, of many kinds
        log.say(f"the curves could not be drawn ({textwrap.shorten(str(error), 200)})")
