"""The report of runs that were: a page that stands alone, and the command that writes it."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import re
import shutil
import signal
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distconv.errors import BadDataError, MissingInputError, UsageError
from distconv.report import main
from distconv.run.folder import members
from distconv.run.log import read_metrics
from distconv.run.report.history import read_history
from distconv.run.report.page import page, write_report
from distconv.run.report.samples import load_samples
from distconv.run.run import Run
from tests import jobs
from tests.histories import epoch, start, step, text_of, write

QUICK = ("--data", "digits", "--limit-train", "300", "--batch-size", "30", "--epochs", "2", "--augment", "rotate=10")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "run"
    result = jobs.run(2, "-m", "distconv.train", *QUICK, "--out", out)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == f"next: python -m distconv.evaluate {out}"
    return out


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


def test_epochs_of_a_single_step_have_no_times_of_the_ranks(tmp_path: Path) -> None:
    result = jobs.run(2, "-m", "distconv.train", *QUICK, "--batch-size", "300", "--out", tmp_path / "run")
    assert result.returncode == 0
    epochs = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["event"] == "epoch"]
    assert [r["busy_seconds"] for r in epochs] == [[], []]
    assert "own time" not in (tmp_path / "run" / "report.html").read_text()


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


def test_the_members_of_an_ensemble_are_compared(tmp_path: Path) -> None:
    for member in range(11):
        write(tmp_path / f"member-{member}", start(), step(1))
    assert members(tmp_path) == [tmp_path / f"member-{member}" for member in range(11)]
    assert members(tmp_path / "member-3") == [tmp_path / "member-3"]
    assert members(tmp_path / ("x" * 300)) == [tmp_path / ("x" * 300)]  # no name that a file can have


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
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    for given, meant in (
        ("", "it holds 'mine': give one of them$"),
        ("min", rf"min does not exist: .* \(did you mean {tmp_path / 'mine'}\?\)$"),
        ("mine/checkpoints", rf"\(did you mean {tmp_path / 'mine'}\?\)$"),
    ):
        with pytest.raises(MissingInputError, match=meant):
            main([str(tmp_path / given)])
    with pytest.raises(MissingInputError, match="no start record"):
        main([str(write(tmp_path / "empty"))])
    with pytest.raises(BadDataError, match="another shape"):
        main([str(write(tmp_path / "odd", start(steps="many"), step(1)))])
    result = jobs.run(0, "-m", "distconv.report", tmp_path / "odd", "--html", tmp_path / "nowhere" / "a.html")
    assert result.returncode == 73 and result.stderr.count("\n") == 1 and "make" in result.stderr


@pytest.mark.parametrize(
    "changed",
    [{"time": 1e300}, {"time": 1e18}, {"time": math.inf}, {"ranks": math.inf}, {"time": 10**400}, {"steps": "many"}],
)
def test_numbers_that_no_run_has_are_told_in_a_sentence(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(BadDataError, match="another shape"):
        main([str(write(tmp_path / "run", start(**changed), step(1)))])


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
