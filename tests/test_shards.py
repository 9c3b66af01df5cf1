"""`train --shards V` and `reproduce`, as a user types them: the same bits on any number of ranks."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from distconv.config import Config
from distconv.errors import UsageError
from distconv.run.folder import find_checkpoints
from distconv.settings import read_settings
from distconv.supervise.supervisor import last_record
from tests import jobs
from tests.test_train import metrics, parameters

FLAGS = (
    "--data=digits", "--model=simpleconvnet", "--shards=6", "--epochs=2", "--limit-train=115", "--batch-size=25",
    "--eval-samples=40", "--checkpoint-seconds=0", "--ema=0.8", "--augment=mnist", "--out",
)  # fmt: skip  # 4 batches of 25 and one of 15


def train(ranks: int, out: Path) -> subprocess.CompletedProcess[str]:
    return jobs.run(ranks, "-m", "distconv.train", *FLAGS, out)


def reproduce(ranks: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return jobs.run(ranks, "-m", "distconv.reproduce", *arguments)


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    """A slow machine is told above it how far the run is."""
    return result.stdout.splitlines()[-1]


def told(out: Path) -> list[dict[str, Any]]:
    """What a run has written down, but for times, and what it sent."""
    records = [record for event in ("step", "epoch", "final") for record in metrics(out, event)]
    return [{key: value for key, value in record.items() if key != "wire_bytes"} for record in records]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folder of a finished run by the number of its ranks."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {ranks: folder / str(ranks) for ranks in (1, 2, 4)}
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(train, runs.keys(), runs.values()):
            assert result.returncode == 0, result.stdout + result.stderr
            assert "6 shards, which give the same bits on 1 to 6 ranks, int16 on the wire" in result.stdout
    return runs


def test_runs_on_any_number_of_ranks_are_the_same_in_all_that_they_tell(runs: dict[int, Path]) -> None:
    wanted = told(runs[1])
    assert wanted[0]["train_loss"] > 0 and wanted[-1]["parameters_sha256"]
    for out in runs.values():
        assert told(out) == wanted
        assert parameters(out) == parameters(runs[1])


def test_a_run_that_is_stopped_goes_on_with_other_ranks_to_the_same_bits(runs: dict[int, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = jobs.Job(3, ["-m", "distconv.train", *FLAGS, out])
    jobs.wait_until(lambda: int(last_record(out / "metrics.jsonl").get("step", 0)) >= 2, job)
    job.ranks()[-1].send_signal(signal.SIGUSR1)
    stopped = job.finish(30)
    if stopped.returncode == 0:  # the last steps were quicker than the signal
        pytest.skip("the run was done before it was asked to stop")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert train(2, out).returncode == 0
    assert told(out) == told(runs[1]) and parameters(out) == parameters(runs[1])


def test_reproduce_says_the_same_bits_or_where_they_differ(runs: dict[int, Path], tmp_path: Path) -> None:
    same = reproduce(2, runs[4])
    assert same.returncode == 0 and last_line(same) == "the same bits: 10 steps on 2 ranks", same.stdout + same.stderr

    lines = (runs[4] / "metrics.jsonl").read_text().splitlines(keepends=True)
    where = next(number for number, line in enumerate(lines) if json.loads(line).get("step") == 4)
    loss = json.loads(lines[where])["train_loss"]
    other = shutil.copytree(runs[4], tmp_path / "other")
    lines[where] = lines[where].replace(repr(loss), repr(loss + 2**-50))
    (other / "metrics.jsonl").write_text("".join(lines))
    config = (other / "config.toml").read_text().replace('resume = "auto"', 'resume = "an.safetensors"')
    (other / "config.toml").write_text(config)
    found = reproduce(3, other, "--json")
    assert "went on from an.safetensors, which may have been made with other settings" in found.stderr
    assert found.returncode == 1
    assert json.loads(found.stdout) == {
        "ranks": 3,
        "steps": 3,
        "same": False,
        "differs_at": f"step 4 has the loss {loss!r}, and had {loss + 2**-50!r}",
    }


@pytest.mark.slow
def test_reproduce_compares_as_far_as_a_run_came_and_the_parameters_of_its_epochs(
    runs: dict[int, Path], tmp_path: Path
) -> None:
    lines = (runs[2] / "metrics.jsonl").read_text().splitlines(keepends=True)
    cut = shutil.copytree(runs[2], tmp_path / "cut")
    (cut / "metrics.jsonl").write_text("".join(lines[:4]))  # the start and three steps
    assert last_line(reproduce(1, cut)) == "the same bits: 3 steps on 1 rank"

    epoch = next(number for number, line in enumerate(lines) if json.loads(line)["event"] == "epoch")
    was = json.loads(lines[epoch])["parameters_sha256"]
    (cut / "metrics.jsonl").write_text("".join(lines[: epoch + 1]).replace(was, "0" * 64))
    found = reproduce(1, cut)
    assert found.returncode == 1
    assert f"epoch 1 ends with the parameters {was[:12]}..., and had 000000000000..." in found.stdout


def test_reproduce_refuses_what_is_no_run_and_other_data(runs: dict[int, Path], tmp_path: Path) -> None:
    nothing = reproduce(2, runs[1] / "checkpoints")
    assert nothing.returncode == 66 and f"a run's folder was expected (did you mean {runs[1]}?)" in nothing.stderr
    several = reproduce(2, shutil.copytree(runs[1], tmp_path / "ensemble" / "member-0").parent)
    assert several.returncode == 66 and f"give {tmp_path / 'ensemble' / 'member-0'}, say" in several.stderr
    other = shutil.copytree(runs[1], tmp_path / "other")
    config = (other / "config.toml").read_text().replace("limit_train = 115", "limit_train = 114")
    (other / "config.toml").write_text(config)
    changed = reproduce(1, other)
    assert changed.returncode == 78 and "bring the old one back" in changed.stderr
    many = reproduce(7, runs[1])
    assert many.returncode == 2 and "--shards 6 with 7 ranks" in many.stderr
    config = (other / "config.toml").read_text().replace("= 114", "= 115").replace("epochs = 2", "epochs = 1")
    (other / "config.toml").write_text(config)
    shorter = reproduce(1, other)
    assert shorter.returncode == 1 and "other bits: training ends after step 5, and came to step 10" in shorter.stdout
    config = config.replace("shards = 6", "shards = 0").replace('"int16"', '"float16"')
    (other / "config.toml").write_text(config)
    unsharded = reproduce(2, other)
    assert unsharded.returncode == 78 and "its bits need as many ranks as it had, 1 and not 2" in unsharded.stderr
    for result in (nothing, several, changed, many):
        assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_more_ranks_than_shards_are_one_sentence(tmp_path: Path) -> None:
    result = train(7, tmp_path / "run")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "--shards 6 with 7 ranks: every rank needs a shard of its own; use 6 ranks or fewer" in result.stderr
    few = jobs.run(1, "-m", "distconv.train", *FLAGS, tmp_path / "run", "--batch-size", "5")
    assert few.returncode == 2 and "--shards 6 with --batch-size 5: every shard needs an image" in few.stderr


def test_shards_take_an_exact_wire_where_none_is_named() -> None:
    assert read_settings(["--shards", "4"])[0] == Config(shards=4, wire="int16")
    assert read_settings(["--shards", "4", "--wire", "int32"])[0].wire == "int32"
    assert read_settings(["--shards", "0"])[0].wire == "float16"
    assert not read_settings(["--shards", "4", "--wire", "float16"])[0].is_exact  # for batch norm alone
    for wrong, part in (
        (["--wire", "int16"], "--wire int16 adds up shards: say how many by --shards"),
        (["--shards", "1025"], "--shards 1025: expected a whole number from 0 to 1024"),
        (["--shards", "-1"], "--shards -1: expected"),
    ):
        with pytest.raises(UsageError, match=part):
            read_settings(wrong)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86")
def test_another_processor_and_another_blas_give_the_same_bits(runs: dict[int, Path], tmp_path: Path) -> None:
    """AVX2 where this one may have AVX-512, and the BLAS of a processor that has neither."""
    features = ",".join(f"+{name}" for name in ("avx", "avx2", "fma", "f16c", "sse4.2", "bmi", "bmi2"))
    older = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features, "OPENBLAS_CORETYPE": "Nehalem"}
    result = jobs.run(2, "-m", "distconv.train", *FLAGS, tmp_path, seconds=200, **older)
    assert result.returncode == 0, result.stdout + result.stderr
    assert told(tmp_path) == told(runs[1])


@pytest.mark.slow
def test_a_run_may_take_to_shards_in_its_middle_and_says_so(tmp_path: Path) -> None:
    plain = [flag for flag in FLAGS if not flag.startswith("--shards")]
    out = tmp_path / "run"
    assert jobs.run(2, "-m", "distconv.train", *plain, out).returncode == 0
    (out / "DONE").unlink()
    for later in find_checkpoints(out / "checkpoints")[:2]:
        later.unlink()
    again = train(2, out)
    assert again.returncode == 0 and "resumed with a change: shards is now 6, was 0" in again.stdout
