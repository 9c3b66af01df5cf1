"""`python -m distconv.prove`: it tells a sound set-up from a broken one."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import matplotlib.image
import psutil
import pytest

from distconv.errors import UsageError
from distconv.prove import main
from tests import jobs

RANK_DEPENDENT = """
import dataclasses
from distconv.process.launched import launcher_rank
from distconv.nn.layers import Affine, Chain, Dropout

class RankDropout(Dropout):
    # Draws from (seed, rank) as many systems do: each rank count is another run.
    def forward(self, x, params, context):
        return super().forward(x, params, dataclasses.replace(context, seed=context.seed + launcher_rank()))

def network(classes): return Chain(Affine(30, relu=True), RankDropout(0.5), Affine(classes))
"""


def prove(*arguments: str, **environment: str):  # type: ignore[no-untyped-def]
    return jobs.run(0, "-m", "distconv.prove", *arguments, **environment)


def test_the_number_of_ranks_does_not_change_the_run_with_any_wire(tmp_path: Path) -> None:
    png, named = tmp_path / "proof.png", f"env PROVED=1 {jobs.MPIRUN}"  # what starts ranks
    result = prove("--ranks", "1,3", "--json", "--mpirun", named, "--png", str(png))
    assert matplotlib.image.imread(png).std() > 0.05
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    wires = ["float64", "float32", "float16", "int8", "int16", "int32"]
    assert [(row["wire"], row["ranks"]) for row in rows] == [(wire, ranks) for ranks in (1, 3) for wire in wires]
    for row in rows:
        assert row["ok"] and row["replicas_equal"] and 0 <= row["max_relative_difference"] <= row["bound"]
    assert rows[0]["max_relative_difference"] == 0  # the same arithmetic
    assert rows[-4]["max_relative_difference"] > 1e-5  # halves did travel
    assert rows[-3]["max_relative_difference"] > 1e-3  # and bytes
    for wire in ("int16", "int32"):
        one, three = [row for row in rows if row["wire"] == wire]
        assert one["parameters_sha256"] == three["parameters_sha256"]
        assert three["max_relative_difference"] == three["bound"] == 0 and three["shards"] == 8


def test_a_gradient_of_nothing_but_rounding_breaks_no_bound(tmp_path: Path) -> None:
    (tmp_path / "of_a_user.py").write_text(
        "from distconv.nn.layers import Affine, Chain, Conv\n"
        "from distconv.nn.normalization import BatchNorm\n"
        "def network(classes): return Chain(Conv(16, stride=2), BatchNorm(True), Affine(classes))\n"
    )
    flags = "--ranks", "1,3", "--wires", "float32,float16", "--model", "of_a_user:network"
    result = prove(*flags, "--json", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stdout
    assert 0 < max(json.loads(line)["max_relative_difference"] for line in result.stdout.splitlines()) < 1e-3


def test_a_data_set_smaller_than_the_batches_that_are_compared_will_do(tmp_path: Path) -> None:
    (tmp_path / "of_a_user.py").write_text(
        "import numpy as np\n"
        "from distconv.data.dataset import Dataset\n"
        "from distconv.nn.layers import Affine\n"
        "network, y = Affine, np.arange(20) % 3\n"
        "def data():\n"
        "    x = np.random.default_rng(0).integers(0, 256, (20, 5, 4, 2), np.uint8)\n"
        "    return Dataset('few', x, y, x, y, classes=3)\n"
    )
    flags = "--ranks", "1,2", "--wires", "float64,int16", "--model", "of_a_user:network", "--data", "of_a_user:data"
    result = prove(*flags, "--json", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["ok"] for line in result.stdout.splitlines()] == [True] * 4


def test_a_model_that_depends_on_the_rank_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(RANK_DEPENDENT)
    result = prove("--ranks", "1,2", "--wires", "float64", "--model", "wrong:network", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    one, two = [line.split()[-1] for line in result.stdout.splitlines() if line.startswith("float64")]
    assert (one, two) == ("ok", "BROKEN")
    assert result.stdout.splitlines()[-1].startswith("a bound is broken")


@pytest.mark.slow
def test_where_shards_part_the_step_and_the_tensor_are_named(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(RANK_DEPENDENT)
    result = prove("--ranks", "1,2", "--wires", "int16", "--model", "wrong:network", "--json", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    one, two = map(json.loads, result.stdout.splitlines())
    assert one["ok"] and not one["differs_at"]
    assert not two["ok"] and two["replicas_equal"] and two["differs_at"].startswith("step 1, affine")
    assert one["parameters_sha256"] != two["parameters_sha256"]


def test_mistakes_are_one_sentence() -> None:
    for arguments, part in (
        (("--ranks", "2,x"), "--ranks 2,x: expected"),
        (("--wires", "float8"), "--wires float8: expected"),
        (("--ranks", "50"), "--batch-size 37 with 50 ranks"),
        (("--ranks", "1,9", "--shards", "8"), "--shards 8 with 9 ranks"),
        (("--shards", "38"), "--shards 38 with 4 ranks and --batch-size 37"),
    ):
        result = prove(*arguments)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and part in result.stderr
    nested = jobs.run(2, "-m", "distconv.prove")
    assert nested.returncode == 1 and "without mpirun" in nested.stderr


def test_float64_is_proved_on_the_cpu_only() -> None:
    with pytest.raises(UsageError, match="--wires float64: expected some of float32,float16"):
        main(["--device", "cuda", "--wires", "float64"])


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("no-such-launcher --flag", 2, "--mpirun no-such-launcher --flag: there is no such command"),
        ("echo", 1, "echo started no ranks of ours, but said: 2 "),
        ("false", 1, "failed with exit code 1: it said nothing"),
    ],
)
def test_what_starts_no_ranks_is_one_sentence(command: str, code: int, said: str) -> None:
    result = jobs.run(0, "-m", "distconv.prove", "--ranks", "2", "--wires", "float16", "--mpirun", command)
    assert result.returncode == code and said in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_prove_that_is_stopped_ends_its_job(number: signal.Signals) -> None:
    job = jobs.Job(0, ["-m", "distconv.prove", "--ranks", "2", "--mpirun", "sh -c 'exec sleep 60'"])
    jobs.wait_until(lambda: bool(psutil.Process(job.process.pid).children()), job)
    job.process.send_signal(number)
    result = job.finish(40)  # which fails where a process is left
    assert result.returncode == 128 + number and "Traceback" not in result.stderr
