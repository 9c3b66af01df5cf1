"""A large model needs its vectors and one message of the wire, and little else, from the start of a run to its end.

And a run says at its start how much that will be.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distconv.run.folder import find_checkpoints
from tests import jobs

SIZE = 20_000_000  # numbers
WIDE = """
import atexit, os
from pathlib import Path
from distconv.process.launched import launcher_rank
from distconv.nn.layers import Affine, Chain, Conv, MaxPool
from distconv.nn.networks import deepconvnet, simpleconvnet
from distconv.nn.parameters import Spec

class Wide:
    def shapes(self, shape):
        return shape, {"W": Spec((int(os.environ["SIZE"]),), 0.1)}

    def forward(self, x, params, context):
        def backward(dy, grads, wants_dx):
            grads["W"][...] = 1e-3 * len(x)
            return dy
        return x, backward

def network(classes):
    return Chain(Wide(), Affine(classes))

def stack(classes):
    wide = [Conv(filters, pad=1, relu=True) for filters in (64, 64, 256, 512, 512, 512, 512)]
    return Chain(Conv(32, pad=1, relu=True), MaxPool(), *wide, Affine(classes))

def tell():
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    Path(os.environ["PEAKS"], f"{launcher_rank()}").write_text(str(peak))

atexit.register(tell)
"""


@pytest.fixture
def peaks(tmp_path: Path):  # type: ignore[no-untyped-def]
    """What says the most memory that each of two ranks held in a command (bytes), with a model of so many numbers."""
    (tmp_path / "wide.py").write_text(WIDE)

    def of(size: int, *arguments: str | Path) -> list[int]:
        environment = {"PYTHONPATH": str(tmp_path), "PEAKS": str(tmp_path), "SIZE": str(size)}
        result = jobs.run(2, "-m", *arguments, seconds=100, **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return [int((tmp_path / str(rank)).read_text()) for rank in range(2)]

    return of


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
def test_a_run_a_resumed_one_and_an_evaluation_hold_no_copies_of_a_large_model(peaks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Peaks less those of a small model, which are the interpreter, the libraries and the data set."""
    data = ("--data", "digits", "--limit-train", "4", "--batch-size", "2", "--eval-samples", "2")
    train = ("distconv.train", "--model", "wide:network", *data)
    small = peaks(1, *train, "--out", tmp_path / "small")
    vectors, message = 4 * 4 * SIZE, 2 * SIZE  # value, gradient and two moments in float32; halves
    # Each rank reads the message of the other where it lies, so the peak of each counts it, too.
    most = [peak + 1.1 * (vectors + message) + message for peak in small]
    for epochs in ("1", "2"):
        found = peaks(SIZE, *train, "--epochs", epochs, "--out", tmp_path / "large")
        assert all(peak <= limit for peak, limit in zip(found, most, strict=True)), (epochs, found, most)

    def evaluate(run: str) -> tuple[str | Path, ...]:
        return "distconv.evaluate", find_checkpoints(tmp_path / run / "checkpoints")[0]

    small = peaks(1, *evaluate("small"))
    rounded = (8 + 4) * SIZE  # the values in float64, and rounded to float32
    found = peaks(SIZE, *evaluate("large"))
    assert all(peak <= base + 1.1 * rounded for peak, base in zip(found, small, strict=True)), (found, small)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("deepconvnet", "--batch-size 1000"),
        ("deepconvnet", "--batch-size 97 --shards 8 --ema 0.9 --augment mnist"),
        ("simpleconvnet", "--batch-size 1000 --exchange two-level"),
        ("stack", "--batch-size 32 --limit-train 64"),
        ("stack", "--batch-size 32 --limit-train 64 --shards 8 --ema 0.9 --optimizer sgd --wire int32"),
        ("network", "--batch-size 4 --limit-train 8 --exchange buckets --wire float32"),
    ],
)
def test_a_run_says_before_its_first_step_how_much_a_rank_will_hold(  # type: ignore[no-untyped-def]
    peaks, tmp_path: Path, model: str, flags: str
) -> None:
    common = "--data digits --epochs 1 --lr 1e-5 --eval-samples 100"
    train = ("distconv.train", "--model", f"wide:{model}", *common.split(), *flags.split())
    held, _ = peaks(SIZE, *train, "--out", tmp_path / "run")
    start = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(start["memory_bytes"] / held - 1) <= 0.1, (start["memory_bytes"], held)
