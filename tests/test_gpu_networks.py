"""Networks of today's blocks on a GPU, emulated or real (`pytest -m gpu`), against those on the CPU.

They are small ones, made of what the networks of nn/networks.py are made of, for images of 8 x 8 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from distconv.comm.start import start
from distconv.comm.world import World
from distconv.config import Config
from distconv.data.dataset import Dataset
from distconv.kernels.gpu.arithmetic import Gpu
from distconv.nn.layers import Affine, Chain, Context, Dropout, Layer, MaxPool
from distconv.nn.networks import _inception, _resnet, _vgg
from distconv.nn.normalization import ConvNorm, Standardize
from distconv.nn.parameters import Parameters
from distconv.nn.pooling import AveragePool, GlobalAveragePool
from distconv.run import loop
from distconv.run.build import build_run
from tests.gpu import DEVICES, Array, error, new_device, normal, random

CLASSES, SHAPE, N = 3, (8, 8, 3), 5


def small_vgg(classes: int) -> Layer:
    return _vgg([16], [16, 32], classes=classes)


def small_resnet(classes: int) -> Layer:
    """With projections, by filters of 1 x 1 and stride 2."""
    return _resnet([16, 32], blocks=1, classes=classes)


def small_googlenet(classes: int) -> Layer:
    return Chain(
        Standardize(), ConvNorm(16), MaxPool(3, 2, pad=1), _inception(8, 6, 16, 4, 8, 4), AveragePool(2, 2),
        GlobalAveragePool(), Dropout(0.4), Affine(classes),
    )  # fmt: skip


NETWORKS = [small_vgg, small_resnet, small_googlenet]


class Passes:
    """A network with numbers in all its parameters, on the CPU in float64, or on a GPU."""

    def __init__(self, model: Layer, gpu: Gpu | None) -> None:
        self.model, self.gpu, self.layout = model, gpu, Parameters(model.shapes(SHAPE)[1])
        for name, view in self.layout.named(self.layout.vector).items():
            spec = self.layout.specs[name]
            view[...] = spec.mean + (spec.deviation or 0.05) * normal(random(len(name)), *spec.shape)
        self.vector = self.layout.vector

    def _there(self, array: Array, dtype: type = np.float32) -> Any:
        if self.gpu is None:
            return array.astype(np.float64) if dtype == np.float32 else array
        return self.gpu.device.upload(array.astype(dtype))

    def _here(self, array: Any) -> Array:
        found: Array = array if self.gpu is None else self.gpu.device.download(array)
        return found

    def _context(self, training: bool) -> Context:
        samples, kernels = np.arange(N), {"kernels": self.gpu} if self.gpu else {}
        step = self._there(np.array([7, 0]), np.uint32) if self.gpu else 7
        return Context(training, 1, step, self._there(samples, np.int32), global_batch=2 * N, **kernels)

    def scores(self, x: Array) -> Array:
        """In evaluation, which folds normalisation into filters."""
        values = self.layout.nested(self._there(self.vector))
        return self._here(self.model.forward(self._there(x), values, self._context(training=False))[0])

    def gradients(self, x: Array, dscores: Array) -> tuple[Array, dict[str, Array]]:
        """Scores and gradients by name, and dx as one of them; those of running means are what moves these."""
        values, gradient = self.layout.nested(self._there(self.vector)), self._there(np.zeros_like(self.vector))
        y, backward = self.model.forward(self._there(x), values, self._context(training=True))
        dx = backward(self._there(dscores), self.layout.nested(gradient), True)
        return self._here(y), {**self.layout.named(self._here(gradient)), "dx": self._here(dx)}


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_and_running_means_are_those_of_the_cpu(gpu: Gpu, network: Callable[[int], Layer]) -> None:
    x, dscores = normal(random(1), N, *SHAPE), normal(random(2), N, CLASSES)
    exact, there = (Passes(network(CLASSES), one).gradients(x, dscores) for one in (None, gpu))
    assert error(there[0], exact[0]) < 1e-5
    assert any(name.endswith("mean") and array.any() for name, array in exact[1].items())
    for name, wanted in exact[1].items():
        if wanted.any():
            assert error(there[1][name], wanted) < 1e-4, name
        else:
            assert not there[1][name].any(), name  # of what the data gave


@pytest.mark.parametrize("network", NETWORKS)
def test_scores_of_an_evaluation_are_those_of_the_cpu(gpu: Gpu, network: Callable[[int], Layer]) -> None:
    x = normal(random(1), N, *SHAPE)
    exact, there = (Passes(network(CLASSES), one).scores(x) for one in (None, gpu))
    assert error(there, exact) < 1e-5


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield start()


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_replayed_step_has_the_bits_of_a_plain_one(
    world: World, kind: str, network: Callable[[int], Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random(0)
    images, labels = rng.integers(0, 256, (22, *SHAPE), np.uint8), rng.integers(0, CLASSES, 22, np.uint8)
    dataset = Dataset("noise", images, labels, images[:3], labels[:3], CLASSES)
    settings = Config(model=f"{__name__}:{network.__name__}", epochs=1, batch_size=N)  # 4 steps of 5 and one of 2
    found = []
    for replays in (True, False):
        device = new_device(kind)
        if not replays:
            monkeypatch.setattr(device, "replayed", lambda key, work, agreed=None: work())
        run = build_run(settings, dataset, world, device=device)
        losses = [record.train_loss for record in loop.train(run, lambda: False)]
        found.append((run.parameters.vector.tobytes(), losses))
        means = [view for name, view in run.parameters.named(run.parameters.vector).items() if "convnorm1.mean" in name]
        assert means and all(mean.all() for mean in means), "the running means did not move"
    assert found[0] == found[1]
