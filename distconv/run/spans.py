"""Spans: which call begins and ends when, of the objects that a step is made of.

Nothing in a step knows of it. While somebody looks, methods and layers are put behind a recorder, and afterwards they
are given back as they were, so that a step that nobody looks at costs nothing. A span costs about a microsecond.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from distconv.kernels.interface import Array
from distconv.nn.fusion import ResidualNorm, with_inner
from distconv.nn.layers import Backward, Context, Layer
from distconv.nn.normalization import ConvNorm
from distconv.nn.parameters import Shape, Specs, Views

MAIN, BUCKETS, DEVICE = 0, 1, 2  # the timelines of a rank: its first thread, the thread of its exchange, its GPU
FORWARD, BACKWARD = "forward", "backward"
WHOLE = "model"  # the name of a model's own span

# Name; way through a layer, else ""; begin and end, of the recorder's clock; timeline.
Span = tuple[str, str, Any, Any, int]


class Spans:
    """A recorder. noted: the spans, in the order of their ends; left_out: how many came after the first `most`.

    now: the clock, in nanoseconds, or in what a device gives for a point of its work. timeline: of all spans; None:
    that of the thread which makes the call.
    """

    def __init__(
        self, most: float = float("inf"), now: Callable[[], Any] = time.perf_counter_ns, timeline: int | None = None
    ) -> None:
        self.noted: list[Span] = []
        self.most, self.left_out = most, 0
        self.now, self.timeline = now, timeline
        self.main_thread = threading.get_ident()
        self.intercepted: list[tuple[dict[str, Any], str, Any]] = []  # attributes of objects, and what they were

    def note(self, name: str, way: str, begin: Any, end: Any) -> None:
        if len(self.noted) >= self.most:
            self.left_out += 1
            return
        timeline = self.timeline
        if timeline is None:
            timeline = MAIN if threading.get_ident() == self.main_thread else BUCKETS
        self.noted.append((name, way, begin, end, timeline))

    def call(self, name: str, way: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What the function returns."""
        begin = self.now()
        result = function(*arguments, **named)
        self.note(name, way, begin, self.now())
        return result

    def intercept(self, owner: object, method: str, name: str) -> None:
        """Note every call of an object's method, or of a module's function, from now on until release."""
        original, attributes = getattr(owner, method), vars(owner)  # which frozen objects have, too
        self.intercepted.append((attributes, method, attributes.get(method)))
        attributes[method] = lambda *arguments, **named: self.call(name, "", original, *arguments, **named)

    def release(self) -> None:
        """Give back what was intercepted."""
        while self.intercepted:
            attributes, method, before = self.intercepted.pop()
            if before is None:
                del attributes[method]
            else:
                attributes[method] = before

    def seconds(self) -> dict[tuple[str, str], float]:
        """How long all spans of a name and a way took together, in the order in which they first ended."""
        sums: dict[tuple[str, str], float] = defaultdict(float)
        for name, way, begin, end, _ in self.noted:
            sums[name, way] += (end - begin) / 1e9
        return dict(sums)


@dataclass(frozen=True)
class TracedLayer:
    """A layer that behaves as the one within it does."""

    name: str
    layer: Layer
    spans: Spans

    @property
    def is_fixed(self) -> bool:
        return getattr(self.layer, "is_fixed", False)

    def shapes(self, input_shape: Shape) -> tuple[Shape, Specs]:
        return self.layer.shapes(input_shape)

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        y, backward = self.spans.call(self.name, FORWARD, self.layer.forward, x, params, context)
        return y, lambda dy, grads, wants_dx: self.spans.call(self.name, BACKWARD, backward, dy, grads, wants_dx)


class TracedNorm(TracedLayer):
    """A ConvNorm of a ResidualNorm."""

    layer: ConvNorm

    def train(self, *arguments: Any) -> tuple[Array, Callable[..., Any]]:
        y, backward = self.spans.call(self.name, FORWARD, self.layer.train, *arguments)
        return y, lambda *arguments: self.spans.call(self.name, BACKWARD, backward, *arguments)


class TracedModel(TracedLayer):
    """A whole model: between its forward and its backward pass, a task computes its loss."""

    def forward(self, x: Array, params: Views, context: Context) -> tuple[Array, Backward]:
        y, backward = super().forward(x, params, context)
        ended, noted = self.spans.now(), len(self.spans.noted)

        def after_the_loss(dy: Array, grads: Views, wants_dx: bool) -> Array | None:
            if len(self.spans.noted) == noted:  # else a task of a user's own has gone through the model again
                self.spans.note("loss", "", ended, self.spans.now())
            return backward(dy, grads, wants_dx)

        return y, after_the_loss


def traced(model: Layer, spans: Spans) -> Layer:
    """The same model and parameters, each of its layers a span, those within chains and blocks, too."""
    return TracedModel(WHOLE, _within(model, spans, ""), spans)


def _within(layer: Layer, spans: Spans, path: str) -> Layer:
    def one(name: str, inner: Layer) -> Layer:
        return TracedLayer(path + name, _within(inner, spans, f"{path}{name}."), spans)

    within = with_inner(layer, one)
    if not isinstance(within, ResidualNorm):
        return within
    norms = ((name, TracedNorm(f"{path}body.{name}", norm, spans)) for name, norm in within.norms)
    return replace(within, norms=tuple(norms))
