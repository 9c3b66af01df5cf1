"""A run with all at once: a schedule, decay, smoothed labels, an average of the weights and changed images."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from distconv.config import Config
from distconv.errors import BadDataError, MismatchError
from distconv.nn.optimizers import Adam
from distconv.nn.parameters import Parameters
from distconv.run import checkpoint as files
from distconv.run.checkpoint import check_same_run, load_checkpoint
from distconv.run.folder import find_checkpoints
from tests import jobs
from tests.test_checkpoint import CONFIG, DATA, SPECS, position, write
from tests.test_forged import forged, good_about
from tests.test_train import metrics, parameters

FLAGS = (
    "-m", "distconv.train", "--data=digits", "--model=simpleconvnet", "--wire=float64", "--checkpoint-seconds=0",
    "--epochs=2", "--limit-train=115", "--batch-size=25", "--eval-samples=40",  # 4 batches of 25 and one of 15
    "--lr=0.004", "--scale-lr=sqrt", "--schedule=one-cycle", "--warmup-epochs=0.4", "--weight-decay=0.5",
    "--label-smoothing=0.1", "--ema=0.8", "--augment=mnist,flip=1,crop=2,brightness=0.2,erase=0.3", "--out",
)  # fmt: skip
# Up to half of --lr, as a batch is of a quarter of the size, in two steps; then down in eight.
RATES = [0.001, 0.002, *(0.002 * (8 - k) / 8 for k in range(8))]


def train(ranks: int, out: Path):  # type: ignore[no-untyped-def]
    return jobs.run(ranks, *FLAGS, out, OPENBLAS_NUM_THREADS="1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folder of a finished run by the number of its ranks."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {ranks: folder / str(ranks) for ranks in (1, 2, 3)}
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(train, runs.keys(), runs.values()):
            assert result.returncode == 0, result.stdout + result.stderr
    return runs


def test_one_rank_and_two_and_three_end_with_the_same_parameters(runs: dict[int, Path]) -> None:
    one, *others = (load_checkpoint(find_checkpoints(out / "checkpoints")[0]).tensors for out in runs.values())
    assert {name.split("/")[0] for name in one} == {"value", "m", "v", "ema"}
    assert any((one[name] != one[name.replace("ema/", "value/")]).any() for name in one if name.startswith("ema/"))
    for other in others:
        assert other.keys() == one.keys()
        for name, wanted in one.items():
            assert np.linalg.norm(other[name] - wanted) <= 1e-12 * np.linalg.norm(wanted), name


def test_the_records_tell_the_rates_and_the_scores_of_the_average(runs: dict[int, Path]) -> None:
    for out in runs.values():
        assert [record["learning_rate"] for record in metrics(out, "step")] == pytest.approx(RATES, rel=1e-12)
        for record in metrics(out, "epoch"):
            assert 0 <= record["ema_test_accuracy"] <= 1
        (final,) = metrics(out, "final")
        assert final["ema_test_accuracy"] * 360 == pytest.approx(round(final["ema_test_accuracy"] * 360), abs=1e-9)


def test_a_run_that_goes_on_in_the_middle_of_an_epoch_is_the_same_to_the_bit(
    runs: dict[int, Path], tmp_path: Path
) -> None:
    out = shutil.copytree(runs[2], tmp_path / "run")
    (out / "DONE").unlink()
    for later in find_checkpoints(out / "checkpoints")[:2]:
        later.unlink()
    again = train(2, out)
    assert again.returncode == 0 and "after step 8 of 10" in again.stdout, again.stdout + again.stderr
    assert parameters(out) == parameters(runs[2])
    assert metrics(out, "step") == metrics(runs[2], "step")
    assert metrics(out, "epoch") == metrics(runs[2], "epoch")
    assert metrics(out, "final") == metrics(runs[2], "final")


def test_a_file_from_before_there_was_an_average_or_a_schedule_is_of_a_run_without(tmp_path: Path) -> None:
    about, path = good_about(), tmp_path / "step-0000000005.safetensors"
    for name in ("ema", *files.CHANGES[1:]):
        del about["config"][name]
    path.write_bytes(forged(about))
    checkpoint = load_checkpoint(path)
    assert check_same_run(checkpoint, CONFIG, DATA["digest"]) == []
    found = check_same_run(checkpoint, Config(schedule="cosine"), DATA["digest"])
    assert found == ["schedule is now cosine, was constant"]
    with pytest.raises(MismatchError, match=r"ema = 0\.0, not 0\.5"):
        check_same_run(checkpoint, Config(ema=0.5), DATA["digest"])


def test_the_average_is_in_a_checkpoint_where_the_run_keeps_one_and_only_there(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="ema, m, v, value"):
        load_checkpoint(write(tmp_path, 1, config=Config(ema=0.5)))
    parameters = Parameters(SPECS)
    state = {**Adam(0.001).new_state(parameters.size, np.float32), "ema": np.float32(range(parameters.size))}
    path = files.save_checkpoint(tmp_path, parameters, state, position(2), Config(ema=0.5), DATA)
    np.testing.assert_array_equal(load_checkpoint(path).tensors["ema/affine1.b"], state["ema"][-5:])
    with pytest.raises(BadDataError, match="not m, v, value"):
        load_checkpoint(files.save_checkpoint(tmp_path, parameters, state, position(3), CONFIG, DATA))
