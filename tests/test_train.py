"""`mpirun -n P python -m distconv.train`, as a user types it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from distconv.run.checkpoint import load_checkpoint
from distconv.run.folder import find_checkpoints
from distconv.run.log import read_metrics
from tests import jobs

QUICK = ("--data", "digits", "--limit-train", "150", "--batch-size", "32", "--eval-samples", "40")  # 5 steps an epoch
MEASURED = {
    "out",
    "time",
    "images_per_second",
    "compute_seconds",
    "exchange_seconds",
    "wait_seconds",
    "busy_seconds",
    "peak_memory_bytes",
    "wire_seconds_float32",
    "slowest_rank",
    "memory_bytes",
}


def train(ranks: int, *arguments: str | Path, **environment: Any) -> subprocess.CompletedProcess[str]:
    return jobs.run(ranks, "-m", "distconv.train", *arguments, **environment)


def metrics(out: Path, event: str = "") -> list[dict[str, Any]]:
    """The records of a run without what is measured."""
    records = [dict(record) for record in read_metrics(out / "metrics.jsonl")]
    return [
        {key: value for key, value in record.items() if key not in MEASURED}
        for record in records
        if event in ("", record["event"])
    ]


def parameters(out: Path) -> bytes:
    """The bits of a finished run's parameters and moments."""
    tensors = load_checkpoint(find_checkpoints(out / "checkpoints")[0]).tensors
    return b"".join(tensors[name].tobytes() for name in sorted(tensors))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs on two ranks that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result = train(2, *QUICK, "--epochs", "3", "--out", out)
    assert result.returncode == 0, result.stderr
    (out / "stdout").write_text(result.stdout)
    return out


def test_a_run_leaves_what_the_contract_promises(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} >= {"config.toml", "metrics.jsonl", "checkpoints", "DONE"}
    events = [record["event"] for record in metrics(whole)]
    assert events == ["start", *(["step"] * 5 + ["epoch"]) * 3, "final"]
    start, final = metrics(whole, "start")[0], metrics(whole, "final")[0]
    assert (start["ranks"], start["device"], start["parameter_count"]) == (2, "cpu", 123_552)
    assert start["versions"]["mpi"]
    assert final["total"] == 360 and final["test_accuracy"] == final["correct"] / 360
    for record in metrics(whole, "epoch"):
        assert 0 <= record["train_accuracy"] <= 1 and record["train_loss"] > 0


def test_the_start_line_is_said_once_and_the_end_tells_where_the_files_are(whole: Path) -> None:
    lines = (whole / "stdout").read_text().splitlines()
    start = [line for line in lines if "123,552 parameters" in line]
    assert len(start) == 1
    for part in ("2 ranks", "1 host", "cpu", "1 BLAS thread a rank", "deepconvnet", "float16", "digits"):
        assert part in start[0]
    assert sum(line.startswith("epoch 3/3:") for line in lines) == 1
    assert str(whole) in lines[-2] and "test accuracy" in lines[-2]
    assert lines[-1] == f"next: python -m distconv.evaluate {whole}"


def test_the_curves_are_a_picture(whole: Path) -> None:
    assert matplotlib.image.imread(whole / "curves.png").std() > 0.05


def test_config_toml_repeats_the_run(whole: Path, tmp_path: Path) -> None:
    assert train(2, "--config", whole / "config.toml", "--out", tmp_path / "again").returncode == 0
    assert metrics(tmp_path / "again") == metrics(whole)


def test_ranks_without_an_image_of_a_tiny_data_set_train_as_one_rank_does(tmp_path: Path) -> None:
    losses = []
    for ranks in (1, 3):
        out = tmp_path / f"{ranks}"
        result = train(ranks, *QUICK, "--limit-train", "2", "--epochs", "3", "--out", out)
        assert result.returncode == 0, result.stderr
        losses.append([record["train_loss"] for record in metrics(out, "step")])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=0.01)


def interrupt(job: jobs.Job, out: Path, step: int, number: signal.Signals, everyone: bool) -> None:
    """Send a signal to the launcher, or to the last rank alone, once the run has done so many steps."""
    jobs.wait_until(lambda: len(metrics(out, "step")) >= step, job)
    target = job.process.pid if everyone else job.ranks()[-1].pid
    jobs.psutil.Process(target).send_signal(number)


@pytest.mark.parametrize(
    ("number", "everyone"), [pytest.param(signal.SIGUSR1, True, marks=pytest.mark.slow), (signal.SIGTERM, False)]
)
def test_a_signal_stops_all_ranks_with_a_checkpoint_and_the_run_goes_on_bit_for_bit(
    whole: Path, tmp_path: Path, number: signal.Signals, everyone: bool
) -> None:
    out = tmp_path / "run"
    command = (*QUICK, "--epochs", "3", "--resume", "never", "--out", out)
    job = jobs.Job(2, ("-m", "distconv.train", *command))
    interrupt(job, out, 7, number, everyone)
    stopped = job.finish(30)
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    done = len(metrics(out, "step"))
    assert load_checkpoint(find_checkpoints(out / "checkpoints")[0]).position["step"] == done < 15
    assert not (out / "DONE").exists()
    (advice,) = re.findall(f"stopped on request after step {done}; the same command with (.*) goes on", stopped.stdout)
    again = train(2, *command, *shlex.split(advice))
    assert again.returncode == 0 and f"after step {done} of 15" in again.stdout
    assert parameters(out) == parameters(whole)
    assert metrics(out, "step") == metrics(whole, "step")
    assert metrics(out, "epoch") == metrics(whole, "epoch")


def without_its_end(out: Path, copy: Path, epochs: int) -> Path:
    """A copy of a finished run, as if it had been killed after so many epochs."""
    shutil.copytree(out, copy)
    (copy / "DONE").unlink()
    for later in find_checkpoints(copy / "checkpoints")[:-epochs]:
        later.unlink()
    return copy


def test_a_run_that_rounds_at_random_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, command = tmp_path / "whole", (*QUICK, "--wire", "int8", "--epochs", "2", "--out")
    assert train(2, *command, whole).returncode == 0
    parts = without_its_end(whole, tmp_path / "parts", 1)
    again = train(2, *command, parts)
    assert again.returncode == 0 and "after step 5 of 10" in again.stdout, again.stderr
    assert parameters(parts) == parameters(whole)
    assert metrics(parts, "step") == metrics(whole, "step")


@pytest.mark.slow
def test_a_run_may_go_on_with_another_number_of_ranks(whole: Path, tmp_path: Path) -> None:
    out = without_its_end(whole, tmp_path / "run", 1)
    more = train(1, *QUICK, "--epochs", "3", "--out", out)
    assert more.returncode == 0 and "after step 5 of 15" in more.stdout, more.stderr
    for ours, undisturbed in zip(metrics(out, "epoch"), metrics(whole, "epoch"), strict=True):
        assert ours["train_loss"] == pytest.approx(undisturbed["train_loss"], rel=0.01)


OWN_MODULE = """
import numpy as np
from distconv.data.dataset import Dataset
from distconv.nn.layers import Affine, Chain, Conv

def network(classes):
    return Chain(Conv(4, size=3, stride=2, relu=True), Affine(classes))

def stripes():
    images = np.zeros((60, 9, 11, 3), np.uint8)
    labels = np.arange(60, dtype=np.uint8) % 3
    images[np.arange(60), :, 4 * labels] = 255
    return Dataset("stripes", images, labels, images, labels, classes=3)
"""


def test_a_model_and_a_data_set_of_the_users_own_are_trained(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_MODULE)
    out = tmp_path / "run"
    own = ("--model", "own:network", "--data", "own:stripes", "--optimizer", "momentum", "--lr", "0.005")
    result = train(2, *own, "--batch-size", "7", "--epochs", "12", "--out", out, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert metrics(out, "final")[0]["test_accuracy"] == 1.0
    shown = jobs.run(
        0, "-m", "distconv.evaluate", *find_checkpoints(out / "checkpoints")[:1], "--json", PYTHONPATH=str(tmp_path)
    )
    assert [json.loads(line)["correct"] for line in shown.stdout.splitlines()] == [60, 60, 60]


def test_batch_norm_that_sees_one_number_a_channel_is_told(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        OWN_MODULE
        + "from distconv.nn.normalization import BatchNorm\n"
        + "def normed(classes): return Chain(Conv(4), BatchNorm(), Affine(8), BatchNorm(True), Affine(classes))\n"
    )
    flags = "--model", "own:normed", "--data", "own:stripes", "--epochs", "1", "--batch-size"
    for ranks, more, told in ((2, ("2",), True), (1, ("2",), False), (1, ("2", "--shards", "2"), True)):
        out = tmp_path / f"{ranks}{len(more)}"
        result = train(ranks, *flags, *more, "--out", out, PYTHONPATH=str(tmp_path))
        assert result.returncode == 0, result.stderr
        assert ("the batch norm of batchnorm2 sees one image at a time" in result.stdout) == told


def test_print_config_prints_a_file_that_config_reads(tmp_path: Path) -> None:
    printed = jobs.run(2, "-m", "distconv.train", "--epochs", "7", "--lr", "1e-4", "--print-config")
    (tmp_path / "printed.toml").write_text(printed.stdout)
    again = jobs.run(0, "-m", "distconv.train", "--config", tmp_path / "printed.toml", "--print-config")
    assert again.stdout == printed.stdout and "epochs = 7\n" in again.stdout


@pytest.mark.parametrize("odd", [pytest.param("settings", marks=pytest.mark.slow), "package"])
def test_a_missed_target_is_exit_code_1_and_a_picture_that_cannot_be_drawn_is_not(tmp_path: Path, odd: str) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")  # needs LaTeX
    environment = {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "garbage"}
    if odd == "package":
        (tmp_path / "matplotlib.py").write_text("raise ImportError('built for another Python')\n")
        environment = {"PYTHONPATH": f"{tmp_path}"}
    out = tmp_path / "run"
    result = train(1, *QUICK, "--epochs", "1", "--target-accuracy", "0.999", "--out", out, **environment)
    assert result.returncode == 1 and "target accuracy 99.90% was missed" in result.stdout and result.stderr == ""
    assert (out / "DONE").exists() and find_checkpoints(out / "checkpoints")
    if odd == "settings":
        assert (out / "curves.png").exists()  # they are the user's, and not for these curves
    else:
        assert "the curves could not be drawn" in result.stdout


FLIPPING = """
import gc, os
import numpy as np
from distconv.process.launched import launcher_rank
from distconv.nn.networks import deepconvnet
from distconv.run.run import Run

class Flipping:
    def __init__(self, inner): self.inner = inner
    def shapes(self, shape): return self.inner.shapes(shape)
    def forward(self, x, params, context):
        rank, slot, step, index, bit = os.environ.get("FLIP", "-1 - 0 0 0").split()
        here = context.step == int(step) > 0 if context.training else int(step) < 0
        if here and launcher_rank() == int(rank):
            run = next(found for found in gc.get_objects() if isinstance(found, Run))
            vector = run.parameters.vector if slot == "value" else run.replica.state[slot]
            if context.training or run.step == -int(step):
                vector.view(np.uint32)[int(index)] ^= np.uint32(1 << int(bit))
                os.environ["FLIP"] = "-1 - 0 0 0"  # once
        return self.inner.forward(x, params, context)

def network(classes): return Flipping(deepconvnet(classes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("flip", ["1 v 3 123551 30", pytest.param("0 value -15 5000 22", marks=pytest.mark.slow)])
def test_after_a_flipped_bit_the_same_command_ends_as_the_undisturbed_run(
    whole: Path, tmp_path: Path, flip: str
) -> None:
    (tmp_path / "flipping.py").write_text(FLIPPING)
    out = tmp_path / "run"
    own = (*QUICK, "--epochs", "3", "--checkpoint-seconds", "0", "--model", "flipping:network", "--out", out)
    disturbed = train(2, *own, PYTHONPATH=str(tmp_path), FLIP=flip)
    assert disturbed.returncode == 70, disturbed.stderr
    assert f"rank {flip[0]} differs from before" in disturbed.stderr and "Traceback" not in disturbed.stderr
    assert train(2, *own, PYTHONPATH=str(tmp_path)).returncode == 0
    assert parameters(out) == parameters(whole)


@pytest.mark.slow
def test_a_diverged_run_goes_on_from_its_last_good_checkpoint(whole: Path, tmp_path: Path) -> None:
    out = without_its_end(whole, tmp_path / "run", 1)
    often = (*QUICK, "--checkpoint-seconds", "0", "--out", out)
    for _ in range(2):  # a second attempt finds what the first one found
        diverged = train(2, *often, "--epochs", "4", "--lr", "1e30")
        assert diverged.returncode == 1 and "use a smaller --lr than 1e+30" in diverged.stderr
        assert "Traceback" not in diverged.stderr
        assert find_checkpoints(out / "checkpoints")[0].name == "step-0000000005.safetensors"
    assert train(2, *often, "--epochs", "4").returncode == 0
    assert metrics(out, "final")[0]["test_accuracy"] > 0.2


# The last updates are too large; the last gradients are not finite; the rate itself is too large for float32.
@pytest.mark.parametrize(("lr", "shown"), [("1", "1"), ("1e9", "1e+09"), ("1e300", "1e+300")])
def test_a_run_whose_loss_explodes_is_no_success(tmp_path: Path, lr: str, shown: str) -> None:
    result = train(1, *QUICK, "--epochs", "1", "--lr", lr, "--out", tmp_path / "run")
    assert result.returncode == 1 and f"use a smaller --lr than {shown}" in result.stderr
    assert result.stderr.count("\n") == 1  # NumPy warns of overflows in lines of its own
    assert not (tmp_path / "run" / "DONE").exists() and not find_checkpoints(tmp_path / "run" / "checkpoints")
