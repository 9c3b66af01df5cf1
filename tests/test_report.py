"""The report: a page that stands alone, tells what the records tell, and says what follows from them."""

from __future__ import annotations

import csv
import fcntl
import html
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distconv.errors import BadDataError, MissingInputError, UsageError
from distconv.report import main
from distconv.run.answers import Answers
from distconv.run.folder import members
from distconv.run.log import describe_steps, read_metrics, steps_alike
from distconv.run.report.advice import advise, on_learning, on_time
from distconv.run.report.charts import in_epochs, score_chart, x_limits
from distconv.run.report.compare import comparison, differences, short_names
from distconv.run.report.history import read_history
from distconv.run.report.page import page, write_report
from distconv.run.report.samples import load_samples
from distconv.run.report.svg import BOTTOM, HEIGHT, TOP
from distconv.run.report.tables import epochs_table
from distconv.run.run import Run
from tests import jobs
from tests.files import ROOT

QUICK = ("--data", "digits", "--limit-train", "300", "--batch-size", "30", "--epochs", "2", "--augment", "rotate=10")
START = {
    "ranks": 2, "hosts": 1, "hostnames": ["one", "two"], "device": "cpu", "precision": "float32", "wire": "float16",
    "exchange": "flat", "model": "deepconvnet", "parameter_count": 10, "data": "digits", "data_sha256": "abc",
    "memory_bytes": 1 << 28, "train_images": 1000, "test_images": 500, "batch_size": 100, "steps": 20,
    "versions": {"distconv": "0.1.0"},
}  # fmt: skip


FINAL = {"event": "final", "time": 9.0, "step": 20}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "run"
    result = jobs.run(2, "-m", "distconv.train", *QUICK, "--out", out)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == f"next: python -m distconv.evaluate {out}"
    return out


def start(time: float = 0.0, **changed: Any) -> dict[str, Any]:
    return {"event": "start", "time": time, "resumed_step": 0, **START, **changed}


def step(number: int, time: float = 0.0, **changed: Any) -> dict[str, Any]:
    return {
        "event": "step", "time": time or number, "step": number, "epoch": 1, "train_loss": 2.0, "learning_rate": 0.001,
        "images_per_second": 1000.0, "compute_seconds": 0.08, "exchange_seconds": 0.01, "wait_seconds": 0.01,
        "wire_bytes": 1000, "wire_seconds_float32": 0.02, "slowest_rank": 1, "skipped": False, **changed,
    }  # fmt: skip


def epoch(number: int, test: float, train: float, **changed: Any) -> dict[str, Any]:
    scores = {"train_accuracy": train, "test_accuracy": test, "train_loss": 1.0}
    return {"event": "epoch", "time": 100.0, "step": 10 * number, "epoch": number, **scores, **changed}


def write(folder: Path, *records: dict[str, Any], config: str = "epochs = 2\n") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.toml").write_text(config)
    return folder


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", page))


def test_a_run_writes_a_page_that_stands_alone_and_tells_its_end(trained: Path) -> None:
    found, final = (trained / "report.html").read_text(), read_metrics(trained / "metrics.jsonl")[-1]
    assert len(found) < 1_500_000
    assert not re.search(r"https?://|<script|@import|url\(", found)  # nothing is loaded, nothing runs
    assert {source[:5] for source in re.findall(r'(?:src|href)="([^"]*)"', found)} == {"data:"}
    charts = re.findall(r"<svg.*?</svg>", found)
    assert len(charts) >= 6
    for chart in charts:
        ElementTree.fromstring(chart)
    said = text_of(found)
    assert f"{final['test_accuracy']:.2%} test accuracy" in said and final["parameters_sha256"] in said
    assert f"{final['correct']:,} of {final['total']:,}" in said and "finished" in said
    assert "--data digits" in said and "--augment rotate=10" in said and "--out" not in said


def test_the_page_tells_the_answers_that_evaluate_finds(trained: Path) -> None:
    result = jobs.run(0, "-m", "distconv.evaluate", trained, "--json", "--confusion", "--precision", "float32")
    score, errors = map(json.loads, result.stdout.splitlines())
    samples = load_samples(trained / "answers.npz")
    assert samples is not None and samples.answers.correct == score["correct"]
    assert samples.answers.confusion().tolist() == errors["confusion"]
    hardest = samples.answers.hardest()[:20]
    assert samples.hardest.tolist() == hardest.tolist() and len(samples.hardest_images) == len(hardest)
    found = (trained / "report.html").read_text()
    assert found.count("<img") == len(hardest) + samples.augmented.shape[0] * samples.augmented.shape[1]
    assert not np.array_equal(samples.augmented[:, 0], samples.augmented[:, 1])  # they are changed


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn", b"\x93NUMPY"])
def test_damaged_answers_cost_only_themselves(trained: Path, tmp_path: Path, damage: bytes) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "answers.npz").write_bytes(damage)
    write_report([folder], folder / "report.html")
    assert "hardest" not in (folder / "report.html").read_text()


def test_answers_that_point_nowhere_are_not_shown(trained: Path, tmp_path: Path) -> None:
    with np.load(trained / "answers.npz") as file:
        arrays = dict(file)
    arrays["hardest"] = arrays["hardest"] + len(arrays["labels"])
    np.savez(tmp_path / "answers.npz", **arrays)
    assert load_samples(trained / "answers.npz") is not None and load_samples(tmp_path / "answers.npz") is None


def test_what_a_user_names_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    folder = write(
        tmp_path / "<b>run", start(model=evil, data=evil, hostnames=[evil, evil]), step(1), epoch(1, 0.5, 0.5)
    )
    (folder / "errors").mkdir()
    (folder / "errors" / "rank-1.json").write_text(json.dumps({"rank": 1, "error": evil}))
    for histories in ([read_history(folder)], [read_history(folder)] * 2):
        assert "<script" not in page(histories) and "<b>run" not in page(histories)


def test_a_stop_writes_the_page_and_says_how_far_it_came(tmp_path: Path) -> None:
    job = jobs.Job(2, ["-m", "distconv.train", *QUICK, "--epochs", "100000", "--out", tmp_path / "run"])
    metrics = tmp_path / "run" / "metrics.jsonl"
    jobs.wait_until(lambda: any(r["event"] == "step" for r in read_metrics(metrics)), job)
    running = read_history(tmp_path / "run")
    assert running.status == "running" and 'http-equiv="refresh"' in page([running])
    job.ranks()[0].send_signal(signal.SIGUSR1)
    assert job.finish(30).returncode == 75
    found = text_of((tmp_path / "run" / "report.html").read_text())
    last = read_metrics(metrics)[-1]["step"]
    assert "stopped" in found and f"It ended after step {last:,} of" in found
    assert 'http-equiv="refresh"' not in (tmp_path / "run" / "report.html").read_text()


def test_a_user_s_file_of_that_name_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    result = jobs.run(0, "-m", "distconv.train", *QUICK, "--out", tmp_path)
    assert result.returncode == 73 and "report.html" in result.stderr
    assert (tmp_path / "report.html").read_text() == "mine"


def test_starts_and_goodput_are_those_of_the_records(tmp_path: Path) -> None:
    records = [start(100), step(1, 105), step(2, 110), start(150, resumed_step=2, ranks=3), step(3, 160), step(4, 190)]
    history = read_history(write(tmp_path, *records))
    assert [(s.seconds, s.lost, s.last_step, s.end) for s in history.stretches] == [
        (10, 0, 2, "ended by an accident"),
        (40, 40, 4, "cut off"),
    ]
    assert history.seconds == 50 and math.isclose(history.goodput, 50 / 90)
    assert history.ranks == 3
    shown = text_of(page([history]))
    assert "2 to 4 40.0 s cut off 40.0 s" in " ".join(shown.split()) and "of 20, 100 images each" in shown
    records.insert(3, {"event": "stop", "time": 110, "step": 2})  # a pause that somebody wanted is no loss
    history = read_history(write(tmp_path, *records))
    assert history.goodput == 1 and [s.end for s in history.stretches] == ["stopped", "cut off"]
    more = [start(100, steps=2), step(1, 105), step(2, 110), start(1000, resumed_step=2, steps=4), step(3, 1010)]
    history = read_history(write(tmp_path, *more))  # finished, and one day somebody gave it more epochs
    assert history.goodput == 1 and [s.end for s in history.stretches] == ["finished", "cut off"]
    backwards = [start(100), step(1, 110), start(50, resumed_step=1), step(2, 60)]  # a clock that was set back
    assert read_history(write(tmp_path, *backwards)).goodput == 1


@pytest.mark.parametrize("status", ["finished", "stopped", "failed", "running", "cut off"])
def test_the_status_is_told_by_the_folder(tmp_path: Path, status: str) -> None:
    last = {
        "finished": [{"event": "final", "time": 9.0, "step": 1}],
        "stopped": [{"event": "stop", "time": 9.0, "step": 1}],
    }
    folder = write(tmp_path, start(), step(1), *last.get(status, []))
    if status == "failed":
        (folder / "errors").mkdir()
        (folder / "errors" / "rank-1.json").write_text(json.dumps({"rank": 1, "error": "no memory"}))
    with (folder / ".distconv-lock").open("w") as lock:
        if status == "running":
            fcntl.flock(lock, fcntl.LOCK_EX)
        history = read_history(folder)
    assert history.status == status and ("rank 1: no memory" in page([history])) == (status == "failed")


@pytest.mark.parametrize(
    ("word", "records"),
    [
        ("not finite", [step(2, skipped=True), epoch(1, 0.9, 0.9)]),
        (
            "It ended after step 2 of 20: the same command with the same --out goes on from its last checkpoint.",
            [step(2), {"event": "stop", "time": 9.0, "step": 2}],
        ),
        ("was best after epoch 1 (95.00%)", [epoch(n, 0.95 - 0.01 * n, 0.95) for n in range(6)]),
        ("knows the training images better", [epoch(n, 0.90, 0.99) for n in range(1, 5)]),
        ("still rising", [epoch(1, 0.5, 0.5), epoch(2, 0.7, 0.7), epoch(3, 0.8, 0.8)]),
        ("came to 80.00% at a constant", [epoch(1, 0.5, 0.5), epoch(2, 0.85, 0.85), epoch(3, 0.8, 0.8)]),
        ("came to 99.00% at a constant", [epoch(n, 0.99, 0.99) for n in range(1, 5)]),
        ("2 epochs tell little", [epoch(1, 0.5, 0.5), epoch(2, 0.7, 0.7)]),
        ("1 epoch tells little", [epoch(1, 0.5, 0.5)]),
        ("came to 95.00%", [epoch(n, 0.5, 0.5, ema_test_accuracy=0.95) for n in range(1, 5)]),
    ],
)
def test_what_to_try_follows_from_losses_and_scores(tmp_path: Path, word: str, records: list[dict[str, Any]]) -> None:
    end = [] if "ended" in word else [step(20), FINAL]
    said = on_learning(read_history(write(tmp_path, start(), step(1), *records, *end)))
    assert word in said and said.endswith(".")


@pytest.mark.parametrize(
    ("word", "of_start", "seconds", "of_epoch"),
    [
        ("Rank 1 on two is busy 50% longer", {}, (0.08, 0.01, 0.01), {"busy_seconds": [0.1, 0.15]}),
        ("40% of a step of rank 0 is waiting", {}, (0.05, 0.01, 0.04), {}),
        ("30% of a step is exchange: --wire int8", {"hosts": 2}, (0.07, 0.03, 0.0), {}),
        (
            "30% of a step is exchange: --wire int8 sends a quarter",
            {"hosts": 2, "wire": "float32"},
            (0.07, 0.03, 0.0),
            {},
        ),
        ("30% of a step is exchange: a larger --batch-size", {"hosts": 2, "wire": "int8"}, (0.07, 0.03, 0.0), {}),
        ("30% of a step is exchange: a larger --batch-size", {"hosts": 2, "wire": "int16"}, (0.07, 0.03, 0.0), {}),
        ("30% of a step is exchange: a larger --batch-size", {}, (0.07, 0.03, 0.0), {}),
        ("40% of a step is exchange, 400 ms, though", {}, (0.6, 0.4, 0.0), {}),
        ("batches of 200 would need 45% fewer steps", {}, (0.08, 0.01, 0.01), {"noise_scale": 1000.0}),
        ("80% of a step is computing", {}, (0.08, 0.01, 0.01), {}),
    ],
)
def test_what_to_try_follows_from_the_time(
    tmp_path: Path, word: str, of_start: dict[str, Any], seconds: tuple[float, ...], of_epoch: dict[str, Any]
) -> None:
    parts = ("compute_seconds", "exchange_seconds", "wait_seconds")
    speed = {"images_per_second": 100 / sum(seconds)}
    steps = [step(n, **dict(zip(parts, seconds, strict=True)), **speed) for n in range(1, 31)]
    said = on_time(read_history(write(tmp_path, start(**of_start), *steps, epoch(1, 0.9, 0.9, **of_epoch))))
    assert word in said and said.endswith(".")


def test_a_run_that_tells_little_is_advised_nothing_wrong(tmp_path: Path) -> None:
    history = read_history(write(tmp_path, start()))
    assert advise(history) == [
        "It ended after step 0 of 20: the same command with the same --out goes on from its last checkpoint, if "
        "there is one."
    ]
    page([history])


def test_the_score_that_is_spoken_of_is_that_of_the_end(tmp_path: Path) -> None:
    records = [start(), step(20), *(epoch(n, 0.99, 0.99) for n in range(1, 5)), {**FINAL, "test_accuracy": 0.91}]
    assert "came to 91.00% at" in on_learning(read_history(write(tmp_path, *records)))
    records[-1] = {**FINAL, "test_accuracy": 1.0}
    assert on_learning(read_history(write(tmp_path, *records))) == ""  # there is no more to be had


def test_scores_of_a_handful_of_images_tell_nothing(tmp_path: Path) -> None:
    fell = [epoch(n, 0.9 - 0.1 * (n > 1), 0.9) for n in range(1, 6)]
    gap = [epoch(n, 0.8, 1.0) for n in range(1, 6)]
    rose = [epoch(n, 0.7 + 0.1 * (n > 4), 0.7) for n in range(1, 6)]
    for epochs, word in ((fell, "fell to"), (gap, "knows the training"), (rose, "still rising")):
        for images, told in ((10, False), (1000, True)):
            folder = write(tmp_path, start(), step(20), *epochs, FINAL, config=f"eval_samples = {images}\n")
            assert (word in on_learning(read_history(folder))) == told


def test_nothing_is_advised_that_was_done_or_would_fail_again(tmp_path: Path) -> None:
    fell = [start(), step(20), *(epoch(n, 0.95 - 0.01 * n, 0.95) for n in range(6)), FINAL]
    done = "patience = 3\nclip_norm = 1.0\n"
    said = on_learning(read_history(write(tmp_path, *fell, config=done)))
    assert "--patience" not in said and said.endswith("let the rate fall by --schedule one-cycle.")
    said = on_learning(read_history(write(tmp_path, *fell, config=f'{done}schedule = "linear"\n')))
    assert said.endswith("fell to 90.00%: try a smaller --lr.")
    said = on_learning(read_history(write(tmp_path, start(), step(1, skipped=True), config=done)))
    assert "--clip-norm" not in said and said.endswith("than 0.001.")
    folder = write(tmp_path, start(), step(1))
    (folder / "errors").mkdir()
    (folder / "errors" / "rank-0.json").write_text(json.dumps({"rank": 0, "error": "use a smaller --lr"}))
    assert "when its cause is mended" in on_learning(read_history(folder))


def test_a_metric_of_a_users_own_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    nothing = {"train_accuracy": None, "test_accuracy": None}
    records = [step(n, train_loss=None if n == 3 else 2.0) for n in range(1, 6)]
    own = {"event": "epoch", "time": 9.0, "step": 5, "epoch": 1, "train_loss": None, "test_iou": 0.25, "train_iou": 0.5}
    history = read_history(write(tmp_path, start(), *records, own))
    assert history.metric == "iou" and history.score == 0.25 and "25.00% test iou" in text_of(page([history]))
    page([read_history(write(tmp_path, start(), *records, epoch(1, 0, 0, **nothing)))])


@pytest.mark.parametrize(("score", "shown"), [(216.0, "216"), (-1.4026, "-1.403"), (0.25, "25.00%")])
def test_a_metric_of_a_users_own_is_in_percent_only_where_it_is_a_share(
    tmp_path: Path, score: float, shown: str
) -> None:
    own = [{"event": "epoch", "time": 9.0, "step": n, "epoch": n, "test_reward": score} for n in (1, 2)]
    final = {"event": "final", "time": 9.0, "step": 2, "metric": "reward", "test_reward": score}
    folder = write(tmp_path, start(), step(1), step(2), *own, final)
    said = text_of(page([read_history(folder)]))
    assert f": {shown} test reward" in said and f"At the end {shown} on the whole test set" in said
    higher = {**own[1], "test_reward": 3.0 if score == 0.25 else score + 3}
    chart = text_of(score_chart(read_history(write(tmp_path, start(), step(1), step(2), own[0], higher))))
    assert "%" not in chart  # nor on the axis, where one number may be a share
    nothing = {**final, "test_reward": None}
    assert "At the end" not in page([read_history(write(tmp_path, start(), step(1), nothing))])


@pytest.mark.parametrize("scores", [(-100.0, -150.0, -200.0), (-3.0, 0.5, 0.9), (0.9, 0.8, 0.7), (1.0, 2.0, 50.0)])
def test_scores_of_several_runs_lie_within_their_chart_or_the_note_says_where(
    tmp_path: Path, scores: tuple[float, ...]
) -> None:
    for n, score in enumerate(scores):
        own = [{"event": "epoch", "time": 9.0, "step": e, "epoch": e, "test_reward": score - 1 / e} for e in (1, 2)]
        write(tmp_path / str(n), start(), step(1), step(2), *own)
    found = comparison([read_history(tmp_path / str(n)) for n in range(len(scores))])
    chart = re.findall(r"<figure><h3>Test score of each epoch.*?</figure>", found)[0]
    heights = [float(y) for y in re.findall(r'<circle [^>]*cy="([^"]*)"', chart)]
    outside = [y for y in heights if not TOP <= y <= HEIGHT - BOTTOM]
    assert len(heights) == 2 * len(scores) and bool(outside) == ("leave the chart" in chart) == (max(scores) == 50)
    assert len({round(y) for y in heights}) > 2  # not all on one edge


def test_what_is_told_of_a_step_is_told_of_the_ranks_that_are_there_now(tmp_path: Path) -> None:
    crowded = {"images_per_second": 500.0, "wait_seconds": 0.15, "slowest_rank": 3}
    before = [start(ranks=4, hostnames=["one"] * 4), *(step(n, **crowded) for n in range(1, 101))]
    before += [epoch(1, 0.5, 0.5, busy_seconds=[0.1, 0.1, 0.1, 0.9])]
    now = [start(resumed_step=100), *(step(n) for n in range(101, 131))]
    history = read_history(write(tmp_path, *before, *now))
    shown = " ".join(text_of(page([history])).split())
    assert "1,000 median, 2 ranks a step 100 ms of it on rank 0 compute 80%, exchange 10%, wait 10%" in shown
    assert on_time(history).startswith("80% of a step is computing") and "rank 3" not in shown
    said = describe_steps(steps_alike(history.records), 2)
    assert "10.00 ms wait" in said and "rank 1 was slowest in 100% of steps" in said
    # As many ranks as before: all steps count again.
    both = [*before, start(ranks=4, hostnames=["one"] * 4, resumed_step=100), step(101)]
    assert len(read_history(write(tmp_path, *both)).steps_of_now("step")) == 101


def test_a_step_has_no_more_images_than_there_are(tmp_path: Path) -> None:
    history = read_history(
        write(tmp_path, start(train_images=50), *(step(n, compute_seconds=0.04) for n in range(1, 4)))
    )
    shown = " ".join(text_of(page([history])).split())
    assert "a step 50 ms of it on rank 0 compute 80%" in shown and "of 20, 50 images each" in shown


def test_parts_of_a_step_are_shares_of_the_same_whole(tmp_path: Path) -> None:
    # Between two exchanges a rank updates its weights, too, which is in none of the parts.
    steps = [step(n, images_per_second=500.0, compute_seconds=0.05, wait_seconds=0.06) for n in range(1, 31)]
    history = read_history(write(tmp_path, start(), *steps))
    assert on_time(history).startswith("30% of a step of rank 0 is waiting")
    assert "compute 25%, exchange 5%, wait 30%" in text_of(page([history]))


def test_averaged_weights_are_what_a_run_is_judged_by(tmp_path: Path) -> None:
    scores = {"test_accuracy": 0.8, "ema_test_accuracy": 0.9}
    assert read_history(write(tmp_path, start(), epoch(1, 0.8, 0.8, **scores))).score == 0.9
    final = {"event": "final", "time": 9.0, "step": 1, "metric": "accuracy", **scores, "ema_test_accuracy": 0.95}
    assert read_history(write(tmp_path, start(), epoch(1, 0.8, 0.8, **scores), final)).score == 0.95


def test_each_score_of_an_epoch_is_drawn_and_stands_in_the_table(tmp_path: Path) -> None:
    # That of averaged weights on the validation set is what --patience goes by.
    scores = {"validation_accuracy": 0.61, "ema_test_accuracy": 0.62, "ema_validation_accuracy": 0.63}
    epochs = [epoch(n, 0.64, 0.65, **scores) for n in range(1, 301)]
    history = read_history(write(tmp_path, start(), step(1), *epochs))
    table, chart = text_of(epochs_table(history)), text_of(score_chart(history))
    for n in range(61, 66):
        assert table.count(f"{n}.00%") == 200 and f"{n}.00%" in chart
    assert "The last 200 of 300." in table


def test_the_answers_of_averaged_weights_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert jobs.run(2, "-m", "distconv.train", *QUICK, "--ema", "0.9", "--out", out).returncode == 0
    flags = ("--json", "--precision", "float32", "--weights", "averaged")
    result = jobs.run(0, "-m", "distconv.evaluate", out, *flags)
    correct, samples = json.loads(result.stdout)["correct"], load_samples(out / "answers.npz")
    final = read_metrics(out / "metrics.jsonl")[-1]
    assert samples is not None and samples.answers.correct == correct != final["correct"]
    assert math.isclose(final["ema_test_accuracy"], correct / final["total"])


def test_the_times_of_the_ranks_are_means_of_an_epoch(trained: Path) -> None:
    run: Any = SimpleNamespace(busy_sum=0.0, busy_steps=0, world=SimpleNamespace(size=2))
    for seconds in ([1.0, 3.0], [3.0, 5.0]):
        Run.note_busy(run, np.array(seconds))
    assert Run.take_busy(run) == [2.0, 4.0]
    Run.note_busy(run, np.array([1.0, 1.0]))
    assert Run.take_busy(run) == [1.0, 1.0] and Run.take_busy(run) == []
    epochs = [record for record in read_metrics(trained / "metrics.jsonl") if record["event"] == "epoch"]
    assert all(len(epoch["busy_seconds"]) == 2 and min(epoch["busy_seconds"]) > 0 for epoch in epochs)


def test_which_rank_became_slow_is_seen_epoch_by_epoch(tmp_path: Path) -> None:
    """A run that went on with more ranks: those of its end are shown."""
    busy = ([0.01, 0.02], [], [0.03, 0.04, 0.05])
    epochs = [epoch(n, 0.9, 0.9, busy_seconds=seconds) for n, seconds in enumerate(busy, start=1)]
    history = read_history(write(tmp_path, start(ranks=3), *(step(n) for n in range(1, 21)), *epochs))
    assert [record["epoch"] for record in history.timed_epochs] == [1, 3]
    table = np.array([[0.01, 0.03], [0.02, 0.04], [math.nan, 0.05]])
    assert np.array_equal(history.rank_seconds, table, equal_nan=True)
    text = page([history])
    assert "rank 2: 50 ms" in text and "rank 1: 20 ms" in text and "from 10 ms to 50 ms" in text


def test_steps_lie_where_they_are_among_the_epochs(tmp_path: Path) -> None:
    history = read_history(write(tmp_path, start(steps=20), *(step(n) for n in range(1, 16)), config="epochs = 2\n"))
    assert np.allclose(in_epochs(history), np.arange(1, 16) / 10) and x_limits(history) == (0, 2)
    few = read_history(write(tmp_path, start(steps=20), step(1), config="epochs = 2\n"))
    assert x_limits(few) == (0, 0.1)


def test_epochs_of_a_single_step_have_no_times_of_the_ranks(tmp_path: Path) -> None:
    result = jobs.run(2, "-m", "distconv.train", *QUICK, "--batch-size", "300", "--out", tmp_path / "run")
    assert result.returncode == 0
    epochs = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["event"] == "epoch"]
    assert [r["busy_seconds"] for r in epochs] == [[], []]
    assert "own time" not in (tmp_path / "run" / "report.html").read_text()


def test_a_long_run_gives_a_small_page(tmp_path: Path) -> None:
    steps = [step(n, train_loss=2 + math.sin(n), images_per_second=1000.0 + n % 7) for n in range(1, 12_001)]
    found = page([read_history(write(tmp_path, start(steps=12_000), *steps, config="epochs = 20\n"))])
    assert len(found) < 300_000 and "of 12,000" in found


def test_several_runs_tell_what_differs_and_nothing_else(tmp_path: Path) -> None:
    for name, lr in (("a", 0.1), ("b", 0.2)):
        records = [step(n) for n in range(1, 21)]
        config = f'epochs = 2\nlr = {lr}\nout = "{name}"\n'
        write(tmp_path / name, start(ranks=2 if name == "a" else 4), *records, epoch(1, lr, 0.5), config=config)
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(tmp_path / "ab.html")]) == 0
    found = (tmp_path / "ab.html").read_text()
    table = found[found.index("What differs") : found.index("Curves")]
    rows = [
        [text_of(cell).strip() for cell in re.findall(r"<t[hd]>.*?</t[hd]>", row)] for row in table.split("<tr>")[1:]
    ]
    assert rows == [["run", "lr", "ranks"], ["a", "0.1", "2"], ["b", "0.2", "4"]]
    assert "10.00%" in found and "20.00%" in found and "http" not in found


def test_the_table_of_what_differs_shows_it_and_names_a_run_as_short_as_may_be(tmp_path: Path) -> None:
    data = [f"/scratch/somebody/data/of/a/long/name/part-{n}.npz" for n in (1, 2)]
    for name, of_run, digest in zip("ab", data, ("0" * 64, "1" * 64), strict=True):
        write(tmp_path / name, start(data_sha256=digest), step(1), config=f'data = "{of_run}"\n')
    histories = [read_history(tmp_path / name) for name in "aba"]
    assert short_names(histories) == ["a", "b", "a"]
    table = text_of(differences(short_names(histories), histories))
    assert data[0] in table and data[1] in table
    assert "000000000000…" in table and "111111111111…" in table and "0" * 64 not in table
    write(tmp_path / "b" / "a", start())
    assert short_names([*histories, read_history(tmp_path / "b" / "a")])[0].endswith(f"{tmp_path.name}/a")


def test_the_members_of_an_ensemble_are_compared(tmp_path: Path) -> None:
    for member in range(11):
        write(tmp_path / f"member-{member}", start(), step(1))
    assert members(tmp_path) == [tmp_path / f"member-{member}" for member in range(11)]
    assert members(tmp_path / "member-3") == [tmp_path / "member-3"]


def test_the_table_has_what_metrics_jsonl_has(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trained), "--html", str(tmp_path / "page.html"), "--csv", str(tmp_path / "table.csv")]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'page.html'} and {tmp_path / 'table.csv'}\n"
    records = [r for r in read_metrics(trained / "metrics.jsonl") if r["event"] != "start"]
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(records)
    for row, record in zip(rows, records, strict=True):
        for key, value in record.items():
            shown = " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
            assert row[key] == shown
        assert all(row[key] == "" for key in row.keys() - record.keys() - {"run"})


def test_watching_ends_with_the_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", start(), step(1))
    with (folder / ".distconv-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = jobs.Job(0, ["-m", "distconv.report", folder, "--watch"])
        jobs.wait_until((folder / "report.html").exists, job)
        assert "running" in (folder / "report.html").read_text()
        write(folder, start(), step(1), {"event": "final", "time": 9.0, "step": 1})
    result = job.finish(30)
    assert result.returncode == 0 and "nothing is running any more" in result.stdout
    assert "finished" in (folder / "report.html").read_text()


def test_what_is_no_run_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"holds no metrics\.jsonl"):
        main([str(tmp_path)])
    with pytest.raises(MissingInputError, match="no start record"):
        main([str(write(tmp_path / "empty"))])
    with pytest.raises(BadDataError, match="another shape"):
        main([str(write(tmp_path / "odd", start(steps="many"), step(1)))])
    result = jobs.run(0, "-m", "distconv.report", tmp_path / "odd", "--html", tmp_path / "nowhere" / "a.html")
    assert result.returncode == 73 and result.stderr.count("\n") == 1 and "make" in result.stderr


@pytest.mark.parametrize(
    "changed", [{"time": 1e300}, {"time": math.inf}, {"ranks": math.inf}, {"time": 10**400}, {"steps": "many"}]
)
def test_numbers_that_no_run_has_are_told_in_a_sentence(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(BadDataError, match="another shape"):
        main([str(write(tmp_path / "run", start(**changed), step(1)))])


def test_a_folder_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [b"r\xff", "m\u00f6".encode()]  # not UTF-8, and UTF-8 that a locale may not have
    for name in names:
        write(Path(os.fsdecode(name)), start(), step(1))
        c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        flags = ("--csv", "table.csv")
        for given in ({}, c_locale):
            command = [sys.executable, "-m", "distconv.report", os.fsdecode(name), *flags]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), **given}
            result = subprocess.run(command, env=environment, capture_output=True, check=False)
            assert result.returncode == 0 and result.stderr == b""
            assert name in (tmp_path / os.fsdecode(name) / "report.html").read_bytes()
            assert name in (tmp_path / "table.csv").read_bytes()


@pytest.mark.parametrize(
    ("flag", "name"), [("--html", "."), ("--html", ""), ("--csv", "metrics.jsonl"), ("--html", "config.toml")]
)
def test_no_file_of_a_run_is_written_over(trained: Path, flag: str, name: str) -> None:
    before = (trained / "metrics.jsonl").read_bytes(), (trained / "config.toml").read_bytes()
    with pytest.raises(UsageError, match="that ends in"):
        main([str(trained), flag, str(trained / name) if name not in ("", ".") else name])
    assert before == ((trained / "metrics.jsonl").read_bytes(), (trained / "config.toml").read_bytes())


def test_a_run_whose_loss_grows_without_bounds_has_a_page_that_says_so(tmp_path: Path) -> None:
    result = jobs.run(2, "-m", "distconv.train", *QUICK, "--lr", "1e6", "--optimizer", "sgd", "--out", tmp_path / "run")
    assert result.returncode == 1
    found = text_of((tmp_path / "run" / "report.html").read_text())
    assert "failed" in found and "use a smaller --lr" in found


def test_confusions_of_many_classes_are_the_most_frequent_ones() -> None:
    from distconv.run.report.pictures import confusion
    from distconv.run.report.samples import Samples

    labels, inferences = np.arange(300) % 100, np.arange(300) % 100
    inferences[labels == 7] = 8
    answers = Answers(100, labels, inferences, np.full(300, 0.5))
    none = np.zeros((0, 1, 1, 1), np.uint8)
    found = confusion(Samples(answers, np.zeros(0, np.int64), none, none[None], [f"class {n}" for n in range(100)]))
    assert "<td>class 7</td><td>class 8</td><td>3</td>" in found and found.count("<tr>") == 2


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium here to open the page with")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_finds_nothing_to_complain_about_and_nothing_wider_than_the_page(
    trained: Path, tmp_path: Path, width: int
) -> None:
    probe = "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script></body>"
    copy = tmp_path / "page.html"
    copy.write_text((trained / "report.html").read_text().replace("</body>", probe))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    where = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", copy.as_uri()]
    result = subprocess.run([*command, *where], capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in result.stderr
    title = re.search(r"<title>(\d+) (\d+)</title>", result.stdout)
    assert title is not None and int(title[1]) <= int(title[2])
