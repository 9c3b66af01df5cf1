"""bench step: rows that programs can rely on, parts that add up, and PyTorch only where it is asked for. No timings."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import matplotlib.image
import numpy as np
import pytest

from distconv.bench import main
from distconv.benchmarks import gpu_step
from distconv.benchmarks import step as benchmark
from distconv.benchmarks.step import (
    HEAD,
    Breakdown,
    Row,
    random_dataset,
    step_flops,
    steps_of_a_turn,
    table,
    where,
)
from distconv.comm.start import start
from distconv.config import Config
from distconv.errors import UsageError
from distconv.nn.blocks import Residual
from distconv.nn.layers import Affine, Chain, Context, Conv, Dropout, Layer, MaxPool, ReLU
from distconv.nn.networks import build_network, usual_image_shape
from distconv.nn.normalization import BatchNorm
from distconv.nn.parameters import Parameters
from distconv.nn.pooling import AveragePool, GlobalAveragePool
from distconv.run.build import build_run
from distconv.run.run import Run
from tests import emulator, jobs

KEYS = {"engine", "device", "ranks", "threads", "batch_size", "wire", "phase", "median_seconds", "images_per_second"}
LAYERS = ["conv1", "conv2", "conv3", "conv4", "conv5", "conv6", "affine1", "dropout1", "affine2", "dropout2"]
OTHERS = ["exchange", "wait", "optimizer", "rest"]


def bench_step(
    ranks: int, *arguments: str | Path, seconds: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    return jobs.run(ranks, "-m", "distconv.bench", "step", *arguments, seconds=seconds, **environment)


def check_rows(result: subprocess.CompletedProcess[str], ranks: int) -> list[tuple[str, int, str]]:
    """Engine, batch size and phase of each line; every line must be an object with all keys."""
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    for row in rows:
        assert set(row) == KEYS
        assert (row["device"], row["ranks"], row["threads"]) == ("cpu", ranks, 1)
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / row["median_seconds"])
    return [(row["engine"], row["batch_size"], row["phase"]) for row in rows]


def test_two_ranks_print_a_row_for_each_batch_size_and_phase() -> None:
    result = bench_step(2, "--repeats", "2", "--batch-size", "20", "5", "--evaluate", "--json")
    expected = [("distconv", batch, phase) for batch in (5, 20) for phase in ("step", "evaluate")]
    assert check_rows(result, ranks=2) == expected
    assert all(json.loads(line)["wire"] == "float16" for line in result.stdout.splitlines())


def test_the_table_names_each_layer_and_its_parts_add_up_to_the_step(tmp_path: Path) -> None:
    png = tmp_path / "step.png"
    result = bench_step(2, "--repeats", "2", "--batch-size", "20", "--png", png)
    assert result.returncode == 0, result.stderr
    above, _, below = result.stdout.partition("\n\n")
    assert above.startswith("deepconvnet, 2 ranks x 1 thread, cpu") and "images/s" in above
    lines = {line.split()[0]: re.findall(r"[\d.]+(?= |$)", line.partition("%")[0][18:]) for line in below.splitlines()}
    assert [name for name in lines if name in [*LAYERS, *OTHERS]] == [*LAYERS, *OTHERS]
    parts = [sum(map(float, lines[name][: 2 if name in LAYERS else 1])) for name in (*LAYERS, *OTHERS)]
    assert min(parts) >= 0
    assert sum(parts) <= float(lines["step"][0]) + 0.005 * 2 * len(parts)  # each number is rounded
    assert sum(parts) == pytest.approx(float(lines["step"][0]), rel=0.05)
    assert "sgemm" in below and re.search(r"\d page faults? a step and held at most \d+ MiB", below)
    assert matplotlib.image.imread(png).std() > 0.05


def test_the_operations_of_a_step_are_those_of_its_products() -> None:
    found = step_flops("deepconvnet")
    assert sum(found.values()) == pytest.approx(52.5e6, rel=0.01)
    pixels = {"conv1": 28 * 28, "conv2": 28 * 28, "conv3": 14 * 14, "conv4": 16 * 16, "conv5": 8 * 8, "conv6": 8 * 8}
    widths = {"conv1": 9 * 16, "conv2": 256 * 9, "conv3": 512 * 9, "conv4": 1024 * 9, "conv5": 2048 * 9}
    widths |= {"conv6": 4096 * 9, "affine1": 1024 * 50, "affine2": 50 * 10}
    for name, weights in widths.items():
        once = 2 * weights * pixels.get(name, 1)
        assert found[name, "forward"] == once
        assert found[name, "backward"] == (once if name == "conv1" else 2 * once)
    assert len(found) == 2 * len(widths)


def test_the_tables_say_what_the_rows_say() -> None:
    def row(engine: str, seconds: float) -> Row:
        return Row(engine, "cpu", 2, 1, 100, "float16", "step", seconds, 100 / seconds)

    ours, theirs = table([row("distconv", 0.05), row("torch-ddp", 0.06)]).splitlines()
    assert len(theirs) == len(HEAD)
    assert ours.split() == ["step", "100", "distconv", "float16", "50.00", "2,000"]
    assert theirs.split()[2:] == ["torch-ddp", "float16", "60.00", "1,667", "1.20", "times"]
    parts = {("conv1", "forward"): 0.01, ("conv1", "backward"): 0.02, ("exchange", ""): 0.01}
    head, conv1, exchange, step, rate, memory = where(
        Breakdown(100, parts, 7, 3 << 20), step_flops("deepconvnet"), 2, 100e9
    ).splitlines()
    assert "rank 0" in head and conv1.split() == ["conv1", "10.00", "20.00", "75.0%", "0.8"]
    assert exchange.split() == ["exchange", "10.00", "25.0%"]
    assert step.split() == ["step", "40.00", "100.0%", "65.5"]  # 50 images of 52.4 MFLOP in 40 ms
    assert "131% of sgemm's 50.0" in rate and memory == "a rank had 7 page faults a step and held at most 3 MiB"


def test_rows_are_printed_before_anything_else_may_fail() -> None:
    script = (
        "from distconv.bench import main\nfrom distconv.benchmarks.step import CpuBench\nCpuBench.breakdown = None\n"
        "main(['step', '--device', 'cpu', '--repeats', '1', '--batch-size', '5', '9', '--json'])"
    )
    result = jobs.run(0, "-c", script)
    assert result.returncode != 0 and json.loads(result.stdout)["batch_size"] == 5


# against PyTorch


def test_without_pytorch_one_sentence_tells_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no such thing here')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = bench_step(2, "--against", "torch", "--repeats", "2", "--batch-size", "20", PYTHONPATH=path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "pip install 'distconv[bench]'" in result.stderr


@pytest.mark.parametrize(("ranks", "rival"), [(0, "torch"), (2, "torch-ddp")])
def test_pytorch_takes_turns_with_ours(ranks: int, rival: str) -> None:
    pytest.importorskip("torch")
    arguments = ("--against", "torch", "--repeats", "2", "--batch-size", "21", "--evaluate", "--json")
    found = check_rows(bench_step(ranks, *arguments), ranks=max(ranks, 1))
    assert found == [(engine, 21, phase) for phase in ("step", "evaluate") for engine in ("distconv", rival)]


def norms(classes: int) -> Chain:
    return Chain(
        Conv(4),
        BatchNorm(False, 0.5, 0.3),
        Conv(4),
        GlobalAveragePool(),
        Affine(6),
        BatchNorm(),
        ReLU(),
        Affine(classes),
    )


@pytest.mark.parametrize("name", ["deepconvnet", "vgg11", "resnet20", "googlenet", f"{__name__}:norms"])
def test_pytorchs_network_is_the_same(name: str) -> None:
    """In training: batch norm takes its statistics from the batch. It knows the gradients, too, of our inputs."""
    torch = pytest.importorskip("torch")
    from distconv.benchmarks.torch_model import translate

    shape = usual_image_shape(name)
    # PyTorch's dropout scales in training, ours in evaluation.
    layers = build_network(name, shape, 10, (10,))[0].layers  # type: ignore[attr-defined]
    ours = Chain.named((name, layer) for name, layer in layers if not isinstance(layer, Dropout))
    parameters = Parameters(ours.shapes(shape)[1])
    parameters.initialize(0)
    theirs = translate(torch, ours, shape)
    arrays = [view for path, view in parameters.named(parameters.vector).items() if parameters.specs[path].trained]
    with torch.no_grad():
        for array, parameter in zip(arrays, theirs.parameters(), strict=True):
            if array.shape == (1024, 50):  # PyTorch flattens an image in (C, H, W) order
                array = array.reshape(4, 4, 64, 50).transpose(2, 0, 1, 3).reshape(1024, 50)
            axes = (3, 2, 0, 1) if array.ndim == 4 else tuple(reversed(range(array.ndim)))
            parameter.copy_(torch.from_numpy(array.transpose(axes).copy()))
    x = np.random.default_rng(0).random((4, *shape), np.float32)
    their_x = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    scores, dscores = theirs(their_x), np.random.default_rng(1).standard_normal((4, 10), np.float32)
    scores.backward(torch.from_numpy(dscores))
    y, backward = ours.forward(x, parameters.values, Context(training=True, global_batch=4))
    dx, their_dx = backward(dscores, parameters.grads, True), their_x.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(scores.detach().numpy(), y, rtol=1e-3, atol=1e-3 * np.abs(y).max())
    # In googlenet, rounding changes who wins pools: float32 is up to 2.4 % off float64, with ten sets of images.
    assert np.linalg.norm(their_dx - dx) < (5e-2 if name == "googlenet" else 1e-2) * np.linalg.norm(dx)
    means = [view for path, view in parameters.named(parameters.gradient).items() if path.endswith(".mean")]
    theirs_too = [buffer for path, buffer in theirs.named_buffers() if path.endswith("running_mean")]
    for mean, running in zip(means[-len(theirs_too) :] if theirs_too else [], theirs_too, strict=True):
        np.testing.assert_allclose(mean, running.numpy(), rtol=0, atol=1e-3 * np.abs(mean).max())


class Own(Conv):
    """A user's convolution, which computes something else."""


@pytest.mark.parametrize("layer", [Own(4), MaxPool(3, 1, pad=2), AveragePool(3, 1, pad=2)], ids=str)
def test_a_layer_that_pytorch_has_not_is_named(layer: Layer) -> None:
    from distconv.benchmarks.torch_model import translate

    model = Chain(Conv(4), Residual(Chain(layer), Chain(layer)))
    with pytest.raises(UsageError, match=f"--against torch: PyTorch .*{type(layer).__name__}"):
        translate(pytest.importorskip("torch"), model, (8, 8, 3))


# mistakes


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--batch-size 0", "--batch-size 0"),
        ("--batch-size x", "--batch-size"),
        ("--repeats 0", "--repeats 0"),
        ("--against tensorflow", "tensorflow"),
        ("--evaluat", "did you mean --evaluate"),
    ],
)
def test_a_mistake_is_seen_before_anything_starts(line: str, named: str) -> None:
    with pytest.raises(UsageError, match=re.escape(named)):
        main(["step", *line.split()])


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("--batch-size", "1"), 2, "--batch-size 1 with 2 ranks"),
        (("--repeats", "none"), 2, "--repeats"),
        (("--png", "none/step.png"), 73, "none"),
        (("--model", "resnet21"), 2, "expected one of"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: tuple[str, ...], code: int, named: str) -> None:
    result = bench_step(2, *arguments)
    assert result.returncode == code and result.stdout == ""
    assert result.stderr.count("\n") == 1 and named in result.stderr


# on a GPU


def test_a_turn_on_a_gpu_has_many_steps_where_they_are_short() -> None:
    assert [steps_of_a_turn(batch_size) for batch_size in (32, 100, 400, 500, 4096)] == [63, 20, 5, 4, 4]


@pytest.mark.skipif(not emulator.available(), reason="no g++ to build the kernels for the CPU")
def test_both_ways_through_each_layer_of_a_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_step, "AT_ONCE", 2)
    monkeypatch.setattr(gpu_step, "TURNS", 1)
    settings = Config(model="tests.test_bench_step:small_network", batch_size=2, epochs=1)
    run = build_run(settings, random_dataset("deepconvnet", 2, 1), start(), device=emulator.Emulator())
    rows = gpu_step.layer_rows(run.replica, "deepconvnet", 2)
    assert [(row.layer, row.way) for row in rows] == [
        (name, way) for name in ("conv1", "affine1", "dropout1") for way in ("forward", "backward")
    ]
    conv, back = rows[:2]
    x, y, weights = 2 * 28 * 28 * 4, 2 * 14 * 14 * 2 * 4, 9 * 2 * 4 + 2 * 4
    assert conv.nbytes == x + y + weights and back.nbytes == x + 2 * y + 2 * weights
    assert conv.flops == 2 * 2 * 9 * 16 * 28 * 28  # deepconvnet's conv1
    table = gpu_step.where(rows, 0.1, peaks=(1e12, 1e9))
    heads = [line.split()[0] for line in table.splitlines()]
    assert heads == ["batch", "conv1", "affine1", "dropout1", "layers", "measured"]
    assert "whole step 100,000.0 us" in table and "%" in table


def block(classes: int) -> Residual:
    return Residual(Chain(Affine(20, relu=True), Affine(classes)), Affine(classes))


def in_a_chain(classes: int) -> Chain:
    return Chain(ReLU(), block(classes))


def test_a_model_that_is_no_chain_is_told_of_as_a_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["step", "--model", f"{__name__}:block", "--batch-size", "4", "--repeats", "2"]) == 0
    out, pixels = capsys.readouterr().out, 32 * 32 * 3
    assert re.search(r"^ +model +\S+ +\S+ +\S+% +\S+$", out, re.MULTILINE), out
    flops = step_flops(f"{__name__}:block")
    assert flops["model", "forward"] == 2 * (pixels * 20 + 20 * 10 + pixels * 10)


@pytest.mark.skipif(not emulator.available(), reason="no g++ to build the kernels for the CPU")
@pytest.mark.parametrize(("network", "layers"), [("block", ["model"]), ("in_a_chain", ["relu1", "residual1"])])
def test_the_weights_within_a_block_are_read_by_its_layer_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, network: str, layers: list[str]
) -> None:
    monkeypatch.setattr(gpu_step, "AT_ONCE", 2)
    monkeypatch.setattr(gpu_step, "TURNS", 1)
    name = f"{__name__}:{network}"
    settings = Config(model=name, batch_size=2, epochs=1)
    run = build_run(settings, random_dataset(name, 2, 1), start(), device=emulator.Emulator())
    rows = gpu_step.layer_rows(run.replica, name, 2)
    assert [row.layer for row in rows] == [layer for layer in layers for _ in range(2)]
    assert rows[-2].nbytes == 4 * (2 * 32 * 32 * 3 + 2 * 10 + run.parameters.size)


@pytest.mark.skipif(not emulator.available(), reason="no g++ to build the kernels for the CPU")
def test_a_turn_on_a_gpu_ends_when_the_gpu_has_nothing_left_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Watched(emulator.Emulator):
        def mark(self) -> None:
            happened.append("begun")

        def synchronize(self) -> None:
            happened.append("idle")

    def small_run(settings: Config, *arguments: Any) -> Run:
        settings = dataclasses.replace(settings, model="tests.test_bench_step:small_network", device="auto")
        return build_run(settings, *arguments[:2], device=Watched())

    monkeypatch.setattr(gpu_step, "build_run", small_run)
    monkeypatch.setattr(benchmark, "LEAST_IMAGES", 10)
    repeats = 2
    engine, _ = gpu_step.GpuBench(start(), "deepconvnet", 2, repeats, "float32", print).engines
    assert engine.steps == 5
    for turn in range(benchmark.WARM_UP + repeats):  # none of them ends an epoch
        happened.clear()
        engine.step()
        assert happened == ["begun"] * (5 if turn else 6) + ["idle"]  # the first one begins a step of the next, too


@pytest.mark.skipif(not emulator.available(), reason="no g++ to build the kernels for the CPU")
def test_where_the_peaks_cannot_be_measured_only_the_shares_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def small_run(settings: Config, *arguments: Any) -> Run:
        device = emulator.Emulator()
        device.peaks = Mock(side_effect=RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED\nand more"))
        settings = dataclasses.replace(settings, model="tests.test_bench_step:small_network", device="auto")
        return build_run(settings, *arguments[:2], device=device)

    layers = [gpu_step.LayerRow("conv1", way, 2, 1e-3, 10, 10) for way in ("forward", "backward")]
    monkeypatch.setattr(gpu_step, "build_run", small_run)
    monkeypatch.setattr(gpu_step, "layer_rows", lambda replica, name, batch_size: layers)
    bench = gpu_step.GpuBench(start(), "deepconvnet", 2, 1, "float32", print)
    parts, text = bench.look_inside([Row(bench.engines[0].name, "cuda", 1, 1, 2, "float16", "step", 0.1, 20)])
    assert parts["rest", ""] == pytest.approx(0.098)
    assert "whole step 100,000.0 us" in text and "%" not in text
    assert text.splitlines()[-1].endswith("could not be measured: CUBLAS_STATUS_NOT_INITIALIZED")


def small_network(classes: int) -> Chain:
    return Chain(Conv(2, pad=1, relu=True), MaxPool(), Affine(classes), Dropout())


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_a_gpu_is_measured_with_pytorch_beside_it() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    arguments = ("--device", "cuda", "--against", "torch", "--repeats", "3", "--batch-size", "32", "--json")
    result = bench_step(0, *arguments, seconds=280)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    engines = ["distconv", "distconv-eager", "torch", "torch-graph"]
    assert [(row["engine"], row["device"]) for row in rows] == [(engine, "cuda") for engine in engines]
