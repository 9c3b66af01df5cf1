"""Whole steps and runs on GPUs, which are emulated."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.typing import DTypeLike

from distconv.comm.world import World
from distconv.config import Config
from distconv.data.dataset import Dataset
from distconv.data.shard import split
from distconv.errors import DistconvError
from distconv.kernels.gpu.arithmetic import Gpu
from distconv.kernels.interface import Array
from distconv.nn.blocks import Branches, Residual
from distconv.nn.layers import Affine, Backward, Chain, Context, Conv, Dropout, Layer, MaxPool, ReLU
from distconv.nn.normalization import ConvNorm, Standardize
from distconv.nn.parameters import Parameters, Shape, Specs, Views
from distconv.nn.pooling import GlobalAveragePool
from distconv.run import loop
from distconv.run.build import build_run
from distconv.run.run import Run
from tests.emulator import Emulator, Kernel, available
from tests.parallel.test_on_gpu import WithNccl

pytestmark = pytest.mark.skipif(not available(), reason="no g++ to build the kernels for the CPU")


def network(classes: int) -> Layer:
    """A small one with all that deepconvnet has."""
    return Chain(
        Conv(4, pad=1, relu=True),
        MaxPool(),
        Conv(4, pad=1, relu=True),
        Affine(6, relu=True),
        Dropout(),
        Affine(classes),
    )


def dataset() -> Dataset:
    """Noise, so that no two numbers of a window are equal."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 6, 8, 1), np.uint8), rng.integers(0, 3, 40, np.uint8)
    return Dataset("noise", images[:33], labels[:33], images[33:], labels[33:], classes=3)


SETTINGS = Config(
    model="tests.parallel.test_gpu_steps:network", batch_size=8, epochs=2, lr=0.01
)  # 4 steps of 8 and one of 1


CPU_SETTINGS = dataclasses.replace(SETTINGS, device="cpu")


def never() -> bool:
    return False


@pytest.mark.parametrize("kind", ["staged", "nccl", "float32 wire"])
def test_steps_on_gpus_are_those_on_cpus(world: World, folder: Path, kind: str) -> None:
    """The same losses step by step, dropout, replay and an epoch's last batch with ranks without samples included."""
    wire = "float32" if kind == "float32 wire" else "float16"
    settings = dataclasses.replace(SETTINGS, wire=wire)
    there = WithNccl(folder, world, "missing" if kind == "staged" else "", on_rank=0)
    exact = build_run(dataclasses.replace(settings, wire="float64", device="cpu"), dataset(), world)
    run = build_run(settings, dataset(), world, device=there)
    assert run.replica.exchange.needs_no_host == (kind != "float32 wire" and (kind == "nccl" or world.size == 1))
    bound = 1e-5 if wire == "float32" else 3e-3
    for one, other in zip(loop.train(exact, never), loop.train(run, never), strict=True):
        assert type(one) is type(other)
        assert other.train_loss == pytest.approx(one.train_loss, rel=bound)
        if isinstance(other, loop.EpochRecord):
            assert other.scores == one.scores
    assert len(set(world.comm.allgather(run.parameters.vector.tobytes()))) == 1
    start = build_run(CPU_SETTINGS, dataset(), world).parameters.vector
    change = np.linalg.norm(exact.parameters.vector - start)
    assert np.linalg.norm(run.parameters.vector - exact.parameters.vector) <= 30 * bound * change


def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_happened(world: World, folder: Path) -> None:
    def fresh() -> Run:
        return build_run(SETTINGS, dataset(), world, device=Emulator(folder))

    through_all, stopped, resumed = fresh(), fresh(), fresh()
    list(loop.train(through_all, never))
    for record in loop.train(stopped, never):
        if record.step == 3:
            break
    stopped.replica.pull()
    vectors = stopped.vectors()
    resumed.restore(stopped.position(), pickle.loads(pickle.dumps(vectors)))
    list(loop.train(resumed, never))
    for run in (through_all, resumed):
        run.replica.pull()
    assert resumed.parameters.vector.tobytes() == through_all.parameters.vector.tobytes()


def test_a_rank_that_begins_steps_ahead_makes_the_same_run(world: World, folder: Path) -> None:
    def fresh() -> Run:
        return build_run(SETTINGS, dataset(), world, device=Emulator(folder))

    plain, ahead = fresh(), fresh()
    expected, at_step = [], {}
    for record in loop.train(plain, never):
        plain.replica.pull()
        expected.append((type(record), record.step, getattr(record, "train_loss", None)))
        at_step[record.step] = plain.parameters.vector.tobytes()
    found, begun = [], set()
    for record in loop.train(ahead, never, ahead=True):
        found.append((type(record), record.step, getattr(record, "train_loss", None)))
        begun |= set(ahead.replica.begun)
    assert found == expected
    assert ahead.parameters.vector.tobytes() == at_step[plain.step]
    # Not an epoch's last, which may be of another size, nor the first of the next.
    assert begun == ({1, 2, 3, 6, 7, 8} if world.size == 1 else set())

    asked = fresh()
    record = next(r for r in loop.train(asked, never, lambda: asked.step == 2, ahead=True) if r.agreed)
    stopped = fresh()
    *_, last = loop.train(stopped, lambda: stopped.step == 2, ahead=True)
    assert record.step == last.step == 3
    assert asked.parameters.vector.tobytes() == stopped.parameters.vector.tobytes() == at_step[3]


def network_of_blocks(classes: int) -> Layer:
    return Chain(
        Standardize(),
        ConvNorm(4),
        Residual(Chain(ConvNorm(6, stride=2), ConvNorm(6, relu=False)), ConvNorm(6, 1, 2, relu=False)),
        Branches(ConvNorm(3, size=1), Chain(MaxPool(3, 1, pad=1), ConvNorm(5, size=5))),
        GlobalAveragePool(),
        Affine(classes),
    )


def test_batch_norm_of_shards_gives_gpus_the_bits_of_one_and_the_losses_of_cpus(world: World, folder: Path) -> None:
    """As it takes its statistics from a shard, whichever rank that is on."""
    settings = dataclasses.replace(
        SETTINGS, model=f"{__name__}:network_of_blocks", shards=4, wire="int32", batch_size=11, epochs=1
    )
    ends, losses = [], []
    with World(world.comm.Split(world.rank), world.library) as alone:
        on_cpu = dataclasses.replace(settings, device="cpu")
        for chosen, ranks, device in (
            (settings, world, Emulator(folder)), (settings, alone, Emulator(folder)), (on_cpu, world, None),
        ):  # fmt: skip
            run = build_run(chosen, dataset(), ranks, device=device)
            losses.append([record.train_loss for record in loop.train(run, never)])
            ends.append(run.parameters.vector.tobytes())
    assert ends[0] == ends[1] and losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-3)


def test_filters_begin_where_a_gpu_loads_four_numbers_at_once(world: World, folder: Path) -> None:
    """Elsewhere they are loaded one by one, and the fastest kernels do not take them."""
    settings = dataclasses.replace(SETTINGS, model=f"{__name__}:network_of_blocks", ema=0.5)
    run = build_run(settings, dataset(), world, device=Emulator(folder))
    replica, first = run.replica, run.parameters.size - run.parameters.trained_size
    assert first % 4
    for vector in (replica.vector, *replica.state_there.values()):  # evaluation takes the average
        assert replica.device.address(vector[first:]) % 16 == 0


def test_the_kernels_of_all_shapes_are_compiled_before_the_first_step(world: World, folder: Path) -> None:
    """Those of an evaluation, too: where a deep network has many, they take longer than a rank may stand still."""

    class Noting(Emulator):
        def function(self, source: str, name: str, defines: tuple[tuple[str, int], ...] = ()) -> Kernel:
            used.add((name, defines))
            return super().function(source, name, defines)

    used = set[tuple[str, tuple[tuple[str, int], ...]]]()
    settings = dataclasses.replace(SETTINGS, model=f"{__name__}:network_of_blocks", epochs=1)
    run = build_run(settings, dataset(), world, device=Noting(folder))
    before = {(name, defines) for name, defines in used if name == "product"}
    list(loop.train(run, never))
    assert before and before == {(name, defines) for name, defines in used if name == "product"}


class NoCopies(WithNccl):
    def copy(self, to: Array, source: Array) -> None:
        raise AssertionError("a copy")


def test_a_step_that_needs_no_host_makes_no_copy(world: World, folder: Path) -> None:
    run = build_run(SETTINGS, dataset(), world, device=NoCopies(folder, world, "", on_rank=0))
    assert run.replica.exchange.needs_no_host
    records = loop.train(run, never, ahead=True)
    assert [next(records).step for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("wire", ["float16", "float32"])
def test_a_rank_that_adds_up_parts_of_its_samples_tells_of_all(world: World, folder: Path, wire: str) -> None:
    """Sums of several parts, some of which have no sample, on devices that need the host in a step and that do not."""
    settings = dataclasses.replace(SETTINGS, accumulate=3, wire=wire, epochs=1)
    losses = []
    for device in (WithNccl(folder, world, "", on_rank=0), None):
        chosen = settings if device else dataclasses.replace(settings, device="cpu", wire="float64")
        run = build_run(chosen, dataset(), world, device=device)
        losses.append([record.train_loss for record in loop.train(run, never)])
    assert losses[0] == pytest.approx(losses[1], rel=3e-3)


def test_a_run_goes_on_after_an_error_within_a_step(world: World, folder: Path) -> None:
    """Those that come before the GPU has taken the step's message, and after."""
    whole, broken = (build_run(SETTINGS, dataset(), world, device=Emulator(folder)) for _ in range(2))
    mine = [np.arange(8)[split(8, world.size, world.rank)] + 8 * i for i in range(3)]
    expected = [whole.replica.compute(step, samples, 8) for step, samples in enumerate(mine)]
    for owner, method in ((broken.replica.mailbox, "begin"), (broken.replica.task, "gradient")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, method, Mock(side_effect=KeyboardInterrupt))
            broken.replica.compute(0, mine[2], 8)
        broken.replica.device.tapes.clear()
    found = [broken.replica.compute(step, samples, 8) for step, samples in enumerate(mine)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["staged", "nccl"])
def test_a_step_that_is_not_finite_changes_nothing(world: World, folder: Path, kind: str) -> None:
    there = WithNccl(folder, world, "missing" if kind == "staged" else "", on_rank=0)
    run = build_run(SETTINGS, dataset(), world, device=there)
    records = loop.train(run, never)
    for _ in range(2):
        next(records)
    run.replica.pull()
    weights, good = run.parameters.vector.copy(), run.parameters.vector.copy()
    weights[0] = np.inf
    run.parameters.vector[...] = weights
    run.replica.push()
    record = next(records)
    assert isinstance(record, loop.StepRecord) and record.skipped
    run.replica.pull()
    np.testing.assert_array_equal(run.parameters.vector, weights)
    run.parameters.vector[...] = good
    run.replica.push()
    record = next(records)
    assert isinstance(record, loop.StepRecord) and not record.skipped


def test_a_gpu_without_memory_for_a_step_is_one_sentence(world: World, folder: Path) -> None:
    class Small(Emulator):
        def empty(self, shape: int | Sequence[int], dtype: DTypeLike) -> Array:
            if np.prod(shape) > 50:
                raise MemoryError("out of memory allocating 512 bytes")
            return super().empty(shape, dtype)

    run = build_run(SETTINGS, dataset(), world, device=Emulator(folder))
    run.replica.device.empty = Small(folder).empty
    with pytest.raises(DistconvError, match=r"too little memory .*512 bytes.*smaller --batch-size"):
        run.replica.compute(0, np.arange(8 // world.size), 8)


def test_a_network_of_a_users_own_may_branch_and_join(world: World, folder: Path) -> None:
    """Its gradients reach the layers as views that are not contiguous."""

    @dataclasses.dataclass(frozen=True)
    class TwoSides:
        left: Layer
        right: Layer

        def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
            (a, left), (b, right) = self.left.shapes(input_shape), self.right.shapes(input_shape)
            return (*a[:2], a[2] + b[2]), {"left": left, "right": right}

        def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
            left, back_left = self.left.forward(x, params["left"], context.within("left"))
            right, back_right = self.right.forward(x, params["right"], context.within("right"))
            F = left.shape[3]

            def backward(dy: Array, grads: Views, wants_dx: bool) -> Array:
                dx = back_left(dy[..., :F], grads["left"], True)
                return dx + back_right(dy[..., F:], grads["right"], True)

            return np.concatenate([left, right], axis=3), backward

    model = Chain(TwoSides(Conv(3, pad=1, relu=True), Conv(2, size=1)), ReLU(), MaxPool(), Affine(3))
    parameters = Parameters(model.shapes((6, 8, 1))[1])
    parameters.initialize(0)
    x, dy = np.random.default_rng(0).standard_normal((2, 6, 8, 1)).astype(np.float32), np.ones((2, 3), np.float32)
    y, backward = model.forward(x, parameters.values, Context(training=True))
    backward(dy, parameters.grads, False)

    gpu = Gpu(Emulator(folder))
    values = parameters.nested(gpu.device.upload(parameters.vector))
    gradient = gpu.device.zeros(parameters.size, np.float32)
    there, backward = model.forward(gpu.device.upload(x), values, Context(training=True, kernels=gpu))
    backward(gpu.device.upload(dy), parameters.nested(gradient), False)
    np.testing.assert_allclose(there, y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, parameters.gradient, rtol=1e-4, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Twice:
    """A user's layer that looks at a gradient before the backward pass is over, and changes it."""

    inner: Layer

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        return self.inner.shapes(input_shape)

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        y, backward_of_inner = self.inner.forward(x, params, context)

        def backward(dy: Array, grads: Views, wants_dx: bool) -> Array | None:
            dx = backward_of_inner(dy, grads, wants_dx)
            grads["W"][...] *= 2
            return dx

        return y, backward


def network_of_a_user(classes: int) -> Layer:
    return Chain(Conv(5, pad=1, relu=True), Twice(Conv(4, pad=1, relu=True)), Affine(classes))


@pytest.mark.parametrize("model", [network, network_of_a_user])
def test_what_the_gpu_tells_of_the_first_step_is_exact(
    world: World, folder: Path, model: Callable[[int], Layer]
) -> None:
    """The gradient of all ranks, before any update, is that of one CPU in float64."""
    settings = dataclasses.replace(SETTINGS, model=f"{__name__}:{model.__name__}")
    exact = build_run(dataclasses.replace(settings, wire="float64", device="cpu"), dataset(), world)
    run = build_run(dataclasses.replace(settings, wire="float32"), dataset(), world, device=Emulator(folder))
    totals = []
    for one in (exact, run):
        samples = np.arange(8)[split(8, world.size, world.rank)]
        one.replica.share(0, samples, 8)
        totals.append(one.parameters.named(one.replica.sum_shares().astype(np.float64)))
    for name, wanted in totals[0].items():
        assert np.linalg.norm(totals[1][name] - wanted) <= 1e-5 * np.linalg.norm(wanted), name
