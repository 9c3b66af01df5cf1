"""Spans of calls, and of layers: what is looked at behaves as before, and is given back."""

from __future__ import annotations

import itertools
import threading

import numpy as np

from distconv.comm.wire import WIRES
from distconv.nn.blocks import Branches, Residual
from distconv.nn.fusion import fused
from distconv.nn.layers import Affine, Chain, Context, Conv, Dropout, MaxPool
from distconv.nn.normalization import ConvNorm
from distconv.nn.parameters import Parameters
from distconv.run import agreement
from distconv.run.spans import BUCKETS, MAIN, Spans, traced


def test_a_recorder_gives_back_what_it_intercepts() -> None:
    class Counter:
        def count(self, by: int = 1) -> int:
            return by

    counter, wire, agree = Counter(), WIRES["float16"], agreement.agree
    counter.other = counter.count  # type: ignore[attr-defined]
    before = [dict(vars(owner)) for owner in (counter, wire)]
    spans = Spans(most=3)
    for owner, method in ((counter, "count"), (counter, "count"), (counter, "other"), (wire, "encode")):
        spans.intercept(owner, method, method)
    spans.intercept(agreement, "agree", "agree")
    assert counter.count(by=4) == 4 and counter.other() == 1  # type: ignore[attr-defined]
    wire.encode(np.zeros(256, np.float32), np.zeros(wire.nbytes(256), np.uint8))
    assert [name for name, *_ in spans.noted] == ["count", "count", "other"] and spans.left_out == 1
    spans.release()
    assert [dict(vars(owner)) for owner in (counter, wire)] == before and agreement.agree is agree


def test_the_layers_of_a_block_that_is_fused_are_seen_and_compute_what_they_compute() -> None:
    body = Chain(ConvNorm(4), ConvNorm(4, relu=False))
    chain = fused(Chain(Residual(body), Residual(body, ConvNorm(4, 1, relu=False))))
    spans, results = Spans(), []
    for one in (chain, traced(chain, spans)):
        parameters = Parameters(one.shapes((6, 6, 4))[1])
        parameters.initialize(0)
        x = np.random.default_rng(0).standard_normal((2, 6, 6, 4), np.float32)
        y, backward = one.forward(x, parameters.values, Context(training=True))
        dx = backward(y, parameters.grads, True)
        results.append((y.tobytes(), parameters.gradient.tobytes(), dx.tobytes()))  # type: ignore[union-attr]
    assert results[0] == results[1]
    within = {"convnorm1", "convnorm2"}
    for way in ("forward", "backward"):
        seen = [name for name, its_way, *_ in spans.noted if its_way == way]
        assert {name.removeprefix("residual1.body.") for name in seen if name.startswith("residual1.")} == within
        assert {"residual2.body.convnorm1", "residual2.body.convnorm2", "residual2.shortcut"} <= set(seen)


def test_a_model_that_is_traced_computes_what_it_computes() -> None:
    chain = Chain(
        Conv(2, pad=1, relu=True),
        Residual(Chain(Conv(3, pad=1), Conv(3, pad=1)), shortcut=Conv(3, size=1), relu=False),
        Branches(Conv(2, size=1), MaxPool(3, 1, 1)),
        Affine(3),
        Dropout(),
    )
    spans, results = Spans(), []
    model = traced(chain, spans)
    assert model.shapes((6, 6, 1)) == chain.shapes((6, 6, 1))
    for one in (chain, model):
        parameters = Parameters(one.shapes((6, 6, 1))[1])
        parameters.initialize(0)
        x = np.random.default_rng(0).standard_normal((2, 6, 6, 1), np.float32)
        final: list[str] = []
        context = Context(training=True, samples=np.arange(2), on_final=final.append)
        y, backward = one.forward(x, parameters.values, context)
        backward(np.ones_like(y), parameters.grads, False)
        results.append((y.tobytes(), parameters.gradient.tobytes(), final))
    assert results[0] == results[1]
    layers = [
        "conv1",
        "residual1",
        "residual1.body",
        "residual1.body.conv1",
        "residual1.body.conv2",
        "residual1.shortcut",
    ]
    layers += ["branches1", "branches1.branch1", "branches1.branch2", "affine1", "dropout1", "model"]
    assert set(spans.seconds()) == {(name, way) for name in layers for way in ("forward", "backward")} | {("loss", "")}


def test_a_task_that_goes_through_the_model_twice_has_spans_that_nest() -> None:
    ticks = iter(range(100))
    spans = Spans(now=lambda: next(ticks))
    model = traced(Dropout(), spans)
    context = Context(training=True, samples=np.arange(2))
    x = np.ones((2, 3), np.float32)
    passes = [model.forward(x, {}, context)[1] for _ in range(2)]
    for backward in passes:
        backward(x, {}, True)
    times = [(begin, end) for _, _, begin, end, _ in spans.noted]
    assert len(times) >= 4 and all(a[1] < b[0] for a, b in itertools.pairwise(times))


def test_another_thread_has_a_timeline_of_its_own_and_times_add_up() -> None:
    ticks = iter(range(0, 100, 10))
    spans = Spans(now=lambda: next(ticks))
    spans.call("a", "", lambda: spans.call("b", "", int))  # 0 to 30, 10 to 20
    thread = threading.Thread(target=spans.call, args=("a", "", int))  # 40 to 50
    thread.start()
    thread.join()
    assert spans.noted == [("b", "", 10, 20, MAIN), ("a", "", 0, 30, MAIN), ("a", "", 40, 50, BUCKETS)]
    assert spans.seconds() == {("b", ""): 10e-9, ("a", ""): 40e-9}
