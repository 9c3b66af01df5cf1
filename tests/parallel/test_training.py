"""The step: the number of ranks does not change the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from distconv import config
from distconv.comm import buckets
from distconv.comm.world import World
from distconv.data import digits
from distconv.data.shard import epoch_order, split
from distconv.errors import DistconvError, ReplicasDifferError
from distconv.kernels.cpu.device import Cpu
from distconv.nn.layers import Affine, Chain
from distconv.run import loop
from distconv.run.answers import gather, softmax
from distconv.run.build import build_run
from distconv.run.run import Run
from distconv.run.scores import scores
from distconv.tasks.classify import Classification

SETTINGS = config.Config(data="digits", epochs=1, batch_size=23, limit_train=100, eval_samples=50, device="cpu")


def make_run(world: World, settings: config.Config = SETTINGS) -> Run:
    return build_run(settings, digits.load().limited(settings.limit_train), world)


def never() -> bool:
    return False


@pytest.mark.parametrize(("wire", "bound"), [("float64", 1e-12), ("float32", 1e-5), ("float16", 1e-3)])
@pytest.mark.parametrize("batch", [23, 2])  # with 3 or 4 ranks, 2 leaves some without any
def test_the_gradients_of_all_ranks_add_up_to_that_of_one(world: World, wire: str, bound: float, batch: int) -> None:
    run = make_run(world, dataclasses.replace(SETTINGS, wire=wire))
    samples = np.random.default_rng(0).permutation(100)[:batch]
    alone = run.replica.share(3, samples, batch).copy()
    run.replica.share(3, samples[split(batch, world.size, world.rank)], batch)
    together = run.parameters.named(run.replica.sum_shares())
    for name, wanted in run.parameters.named(alone).items():
        assert np.linalg.norm(together[name] - wanted) <= bound * np.linalg.norm(wanted), name


def test_an_epoch_ends_with_equal_replicas_and_exact_sums(world: World) -> None:
    run = make_run(world)
    records = list(loop.train(run, never))
    steps = [record for record in records if isinstance(record, loop.StepRecord)]
    epoch = records[-1]
    assert isinstance(epoch, loop.EpochRecord)
    assert len(steps) == 5  # 4 batches of 23 and one of 8
    weights = [23, 23, 23, 23, 8]
    mean = np.average([step.train_loss for step in steps], weights=weights)
    assert epoch.train_loss == pytest.approx(float(mean), rel=1e-12)
    assert len(set(world.comm.allgather(run.parameters.vector.tobytes()))) == 1
    assert len(set(world.comm.allgather((epoch.train_loss, epoch.scores["train"], epoch.scores["test"])))) == 1


class InArrays(Classification):
    """Its sums are arrays of one number."""

    def gradient(self, *arguments):  # type: ignore[no-untyped-def]
        return [np.array([one]) for one in super().gradient(*arguments)]

    def evaluate(self, *arguments):  # type: ignore[no-untyped-def]
        return [np.array([one]) for one in super().evaluate(*arguments)]


@pytest.mark.parametrize("task", ["classify", f"{__name__}:InArrays"])
def test_the_accuracy_counts_every_image_once(world: World, task: str) -> None:
    run = make_run(world, dataclasses.replace(SETTINGS, task=task))
    replica, labels = run.replica, run.data.test_labels  # type: ignore[attr-defined]
    parts: list[float] = []
    given = scores(run.data, replica.model, replica.values, Cpu(), world, parts.append)
    assert parts == sorted(set(parts)) and parts[-1] == 1.0
    found = gather(given, softmax(given), labels, world).inferences
    assert found.shape == labels.shape
    for most in (101, 0):
        count = most or len(labels)
        assert run.measure("test", most) == (np.count_nonzero(found[:count] == labels[:count]), count)


def test_a_flipped_bit_on_one_rank_is_found_and_named(world: World) -> None:
    if world.size == 1:
        pytest.skip("one replica cannot differ from itself")
    run = make_run(world)
    with pytest.raises(ReplicasDifferError, match=f"rank {world.size - 1} differs"):
        for record in loop.train(run, never):
            if record.step == 5 and world.rank == world.size - 1:
                run.parameters.vector.view(np.uint32)[777] ^= 1


def test_all_ranks_stop_after_the_same_step_when_one_is_asked_to(world: World) -> None:
    run = make_run(world)
    requests: Iterator[bool] = iter([False, False, world.rank == world.size - 1, False, False])
    records = list(loop.train(run, lambda: next(requests)))
    assert records[-1] == loop.StopRecord(3)
    assert run.position()["cursor"] == 3 * 23


def with_a_bad_rank(run: Run, bad_steps: set[int]) -> None:
    """Make the last rank's gradient NaN in some steps, counted from 0."""
    whole = run.replica.model

    class Poisoned:
        def shapes(self, shape):  # type: ignore[no-untyped-def]
            return whole.shapes(shape)

        def forward(self, x, params, context):  # type: ignore[no-untyped-def]
            y, backward = whole.forward(x, params, context)

            def poisoned(dy, grads, wants_dx):  # type: ignore[no-untyped-def]
                dx = backward(dy, grads, wants_dx)
                if context.step in bad_steps:
                    grads["conv3"]["W"][0, 0, 0, 0] = np.nan
                return dx

            return y, poisoned

    if run.world.rank == run.world.size - 1:
        run.replica.model = Poisoned()


def test_a_gradient_that_is_not_finite_makes_all_ranks_skip_the_same_step(world: World) -> None:
    run = make_run(world)
    with_a_bad_rank(run, {1, 3})
    steps = [record for record in loop.train(run, never) if isinstance(record, loop.StepRecord)]
    assert [step.skipped for step in steps] == [False, True, False, True, False]
    assert np.isfinite(run.parameters.vector).all()
    assert len(set(world.comm.allgather(run.parameters.digest()))) == 1


@pytest.mark.parametrize(("first", "advice"), [(0, "no step was made yet"), (1, "use a smaller --lr")])
def test_ten_bad_steps_in_a_row_end_the_run_on_every_rank(world: World, first: int, advice: str) -> None:
    run = make_run(world, dataclasses.replace(SETTINGS, batch_size=8))
    with_a_bad_rank(run, set(range(first, 100)))
    with pytest.raises(DistconvError, match=rf"10 steps in a row .*conv3.W on rank {world.size - 1}\): {advice}"):
        list(loop.train(run, never))
    assert run.step == first + 10


def test_a_run_in_buckets_behind_the_backward_pass_trains_as_any(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET", 20_000)
    losses = []
    for kind in ("flat", "buckets"):
        run = make_run(world, dataclasses.replace(SETTINGS, exchange=kind, wire="float64"))
        losses.append([step.train_loss for step in loop.train(run, never) if isinstance(step, loop.StepRecord)])
        assert len(set(world.comm.allgather(run.parameters.digest()))) == 1
    np.testing.assert_allclose(*losses, rtol=1e-9)


class Twice(Classification):
    """Each image counts twice, by two passes through the model."""

    def gradient(self, *arguments):  # type: ignore[no-untyped-def]
        once, again = super().gradient(*arguments), super().gradient(*arguments)
        return (once[0] + again[0], *once[1:])


class Mirrored:
    """What a chain makes of an image, and what it makes of its mirror image."""

    def __init__(self, classes: int) -> None:
        self.chain = Chain(Affine(500, relu=True), Affine(classes))

    def shapes(self, input_shape):  # type: ignore[no-untyped-def]
        return self.chain.shapes(input_shape)

    def forward(self, x, params, context):  # type: ignore[no-untyped-def]
        (y, once), (mirrored, again) = (self.chain.forward(z, params, context) for z in (x, x[:, :, ::-1]))
        return y + mirrored, lambda dy, grads, wants_dx: (once(dy, grads, False), again(dy, grads, False))[0]


@pytest.mark.parametrize(
    "own", [{"task": f"{__name__}:Twice"}, {"model": f"{__name__}:Mirrored"}], ids=["task", "model"]
)
def test_buckets_wait_for_a_weight_that_is_used_twice(
    world: World, monkeypatch: pytest.MonkeyPatch, own: dict[str, str]
) -> None:
    monkeypatch.setattr(buckets, "BUCKET", 1000)
    vectors = []
    for kind in ("flat", "buckets"):
        settings = dataclasses.replace(SETTINGS, exchange=kind, wire="float64", optimizer="sgd", **own)
        run = build_run(settings, digits.load().limited(100), world)
        list(loop.train(run, never))
        vectors.append(run.parameters.vector)
    np.testing.assert_allclose(*vectors, rtol=1e-9, atol=1e-12)


def test_what_passed_before_a_run_goes_on_within_an_epoch_is_no_part_of_a_step(world: World) -> None:
    run = make_run(world)
    run.step, run.exchanged = 1, -1e9
    next(loop.train(run, never))
    assert run.busy_steps == 1 and run.busy_sum.max() < 1e6


@pytest.mark.parametrize("exchange", ["flat", "buckets"])
def test_a_run_on_the_int8_wire_repeats_to_the_bit_and_hangs_on_its_seed(
    world: World, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "BUCKET", 20_000)
    settings, digests = dataclasses.replace(SETTINGS, exchange=exchange, wire="int8", limit_train=46), []
    for seed in (0, 0, 1):
        run = make_run(world, dataclasses.replace(settings, seed=seed))
        shared = np.random.default_rng(0).standard_normal(run.parameters.size).astype(np.float32)
        run.replica.gradient[...] = shared
        digests.append((run.replica.sum_shares().tobytes(), [*loop.train(run, never)][-1].parameters_sha256))  # type: ignore[union-attr]
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[2][0]
    assert world.comm.allgather(digests) == [digests] * world.size


def test_the_time_asleep_in_the_exchange_is_a_wait(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(function: Callable[..., object]) -> Callable[..., object]:
        def exchange(*arguments: object) -> object:
            slept.append(1000.0)  # seconds, by the clock of sleep alone
            return function(*arguments)

        return exchange

    run, slept = make_run(world), [0.0]
    inner = run.replica.exchange.inner  # type: ignore[union-attr]
    monkeypatch.setattr(inner, "sum", slow(inner.sum))
    monkeypatch.setattr(type(inner), "waited", property(lambda exchange: sum(slept)))
    record = next(loop.train(run, lambda: False))
    assert isinstance(record, loop.StepRecord)
    assert record.wait_seconds >= 1000 and record.exchange_seconds == 0

    monkeypatch.setattr(run.probe.exact, "sum", slow(run.probe.exact.sum))
    run.probe.time()
    assert run.probe.seconds < 0  # the thousand are not in it


@pytest.mark.parametrize("exchange", ["flat", "buckets"])
def test_a_batch_in_parts_is_the_batch(world: World, exchange: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uneven parts, and more parts than a rank has images in the last batch; a bucket is sent with the last part."""
    monkeypatch.setattr(buckets, "BUCKET", 20_000)
    exact = dataclasses.replace(SETTINGS, wire="float64", exchange=exchange)
    whole, parts = dataclasses.replace(exact, batch_size=42), dataclasses.replace(exact, batch_size=14, accumulate=3)
    runs = [make_run(world, settings) for settings in (whole, parts)]
    losses = [[record.train_loss for record in loop.train(run, never) if hasattr(record, "skipped")] for run in runs]
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-12)
    np.testing.assert_allclose(runs[1].parameters.vector, runs[0].parameters.vector, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["lars", "lamb"])
def test_layerwise_optimizers_make_the_same_step_on_all_ranks(world: World, optimizer: str) -> None:
    settings = dataclasses.replace(SETTINGS, optimizer=optimizer, weight_decay=0.01, clip_norm=0.1)
    run = make_run(world, settings)
    records = [record for record in loop.train(run, never) if isinstance(record, loop.EpochRecord)]
    assert len(set(world.comm.allgather(records[-1].parameters_sha256))) == 1


def test_the_noise_scale_is_that_of_the_paper_over_the_steps_of_an_epoch(world: World) -> None:
    """McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1, for shares of one size."""
    settings = dataclasses.replace(SETTINGS, model="simpleconvnet", wire="float64", batch_size=96, epochs=2)
    data, B, b = digits.load(), 96, 96 // world.size
    images, labels = (np.concatenate([part] * 4)[: 50 * B] for part in (data.train_images, data.train_labels))
    data = dataclasses.replace(data, train_images=images, train_labels=labels)
    run, again = build_run(settings, data, world), build_run(settings, data, world)
    before = run.parameters.vector.copy()
    every, looks = {1: 2, 2: 3, 3: 4, 4: 5}[world.size], []  # a look at each 100 samples of a rank
    for record in loop.train(run, never):
        if isinstance(record, loop.EpochRecord):
            if world.size == 1:
                assert np.isnan(record.noise_scale)
            else:
                noise, signal = np.mean(looks, axis=0)
                assert record.noise_scale == pytest.approx(noise / signal if signal > 0 else np.inf, rel=1e-6)
                assert noise > 0
                apart = np.array(looks) @ [1 / noise, -1 / signal]
                error = apart.std(ddof=1) / np.sqrt(len(looks))
                assert record.noise_scale_error == pytest.approx(error if signal > 0 else np.nan, rel=1e-6, nan_ok=True)
            looks = []
            continue
        again.parameters.vector[...] = before
        epoch, batch = divmod(record.step - 1, 50)
        order = epoch_order(settings.seed, epoch, 50 * B)
        mine = order[batch * B : (batch + 1) * B][split(B, world.size, world.rank)]
        share = again.replica.share(record.step - 1, mine, B).copy()
        before = run.parameters.vector.copy()
        g = world.comm.allreduce(share)
        small = np.mean(world.comm.allgather(float(share @ share) * (B / b) ** 2))
        large = float(g @ g)
        if b < B and (record.step - 1) % every == 0:
            looks.append(((small - large) / (1 / b - 1 / B), (B * large - b * small) / (B - b)))
    assert run.step == 100
