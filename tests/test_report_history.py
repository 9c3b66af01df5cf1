"""What a report tells of records, and what it says follows from them."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distconv.run.answers import Answers
from distconv.run.log import describe_steps, steps_alike
from distconv.run.report.advice import advise, on_learning, on_time
from distconv.run.report.charts import in_epochs, score_chart, x_limits
from distconv.run.report.compare import comparison, differences, short_names
from distconv.run.report.history import read_history
from distconv.run.report.page import page
from distconv.run.report.svg import BOTTOM, HEIGHT, TOP
from distconv.run.report.tables import epochs_table
from distconv.settings import RECIPES, read_settings
from tests.files import ROOT
from tests.histories import FINAL, epoch, start, step, text_of, write


@pytest.mark.parametrize(
    "flags", [*(["--recipe", name] for name in RECIPES), ["--shards", "2", "--model", "a:b"], ["--lr", "1e-7"]]
)
def test_the_command_has_the_settings_of_the_run(flags: list[str], tmp_path: Path) -> None:
    settings, _ = read_settings(flags)
    command = read_history(write(tmp_path / "run", start(), config=settings.toml())).command
    mpirun, again = command.split(" python -m distconv.train ")
    assert mpirun == "mpirun -n 2" and read_settings(shlex.split(again)) == (settings, "")


def test_what_a_user_names_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    folder = write(
        tmp_path / "<b>run", start(model=evil, data=evil, hostnames=[evil, evil]), step(1), epoch(1, 0.5, 0.5)
    )
    (folder / "errors").mkdir()
    (folder / "errors" / "rank-1.json").write_text(json.dumps({"rank": 1, "error": evil}))
    for histories in ([read_history(folder)], [read_history(folder)] * 2):
        assert "<script" not in page(histories) and "<b>run" not in page(histories)


def test_starts_and_goodput_are_those_of_the_records(tmp_path: Path) -> None:
    records = [start(100), step(1, 105), step(2, 110), start(150, resumed_step=2, ranks=3), step(3, 160), step(4, 190)]
    history = read_history(write(tmp_path, *records))
    assert [(s.seconds, s.lost, s.last_step, s.end) for s in history.attempts] == [
        (10, 0, 2, "ended by an accident"),
        (40, 40, 4, "cut off"),
    ]
    assert history.seconds == 50 and math.isclose(history.goodput, 50 / 90)
    assert history.ranks == 3
    shown = text_of(page([history]))
    assert "2 to 4 40.0 s cut off 40.0 s" in " ".join(shown.split()) and "of 20, 100 images each" in shown
    records.insert(3, {"event": "stop", "time": 110, "step": 2})  # a pause that somebody wanted is no loss
    history = read_history(write(tmp_path, *records))
    assert history.goodput == 1 and [s.end for s in history.attempts] == ["stopped", "cut off"]
    more = [start(100, steps=2), step(1, 105), step(2, 110), start(1000, resumed_step=2, steps=4), step(3, 1010)]
    history = read_history(write(tmp_path, *more))  # finished, and one day somebody gave it more epochs
    assert history.goodput == 1 and [s.end for s in history.attempts] == ["finished", "cut off"]
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


def test_how_well_the_noise_scale_is_known_is_told_and_drawn(tmp_path: Path) -> None:
    errors = (0.1, 0.2)
    known = [epoch(n, 0.9, 0.9, noise_scale=300.0, noise_scale_error=error) for n, error in enumerate(errors, start=1)]
    text = text_of(page([read_history(write(tmp_path / "known", start(), step(10), *known))]))
    # Of two epochs alike, the error of the mean is half of the root of 0.1 and 0.2 squared.
    assert "300 ± 11%" in text
    assert re.search(r"plus its error\s+360\s+minus its error\s+240", text)
    before = [epoch(n, 0.9, 0.9, noise_scale=300.0) for n in (1, 2)]  # as versions wrote it that knew no error
    text = text_of(page([read_history(write(tmp_path / "before", start(), step(10), *before))]))
    assert "300" in text and "±" not in text and "its error" not in text


def test_each_score_of_an_epoch_is_drawn_and_stands_in_the_table(tmp_path: Path) -> None:
    # That of averaged weights on the validation set is what --patience goes by.
    scores = {"validation_accuracy": 0.61, "ema_test_accuracy": 0.62, "ema_validation_accuracy": 0.63}
    epochs = [epoch(n, 0.64, 0.65, **scores) for n in range(1, 301)]
    history = read_history(write(tmp_path, start(), step(1), *epochs))
    table, chart = text_of(epochs_table(history)), text_of(score_chart(history))
    for n in range(61, 66):
        assert table.count(f"{n}.00%") == 200 and f"{n}.00%" in chart
    assert "The last 200 of 300." in table


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


def test_a_long_run_gives_a_small_page(tmp_path: Path) -> None:
    steps = [step(n, train_loss=2 + math.sin(n), images_per_second=1000.0 + n % 7) for n in range(1, 12_001)]
    found = page([read_history(write(tmp_path, start(steps=12_000), *steps, config="epochs = 20\n"))])
    assert len(found) < 300_000 and "of 12,000" in found


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


def test_confusions_of_many_classes_are_the_most_frequent_ones() -> None:
    from distconv.run.report.pictures import confusion
    from distconv.run.report.samples import Samples

    labels, inferences = np.arange(300) % 100, np.arange(300) % 100
    inferences[labels == 7] = 8
    many = 10**6  # a matrix of so many would take 8 TB
    answers = Answers(many, labels, inferences, np.full(300, 0.5))
    none = np.zeros((0, 1, 1, 1), np.uint8)
    found = confusion(Samples(answers, np.zeros(0, np.int64), none, none[None], [f"class {n}" for n in range(many)]))
    assert "<td>class 7</td><td>class 8</td><td>3</td>" in found and found.count("<tr>") == 2
