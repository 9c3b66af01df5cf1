"""What a device must offer: the arithmetic of layers, losses and optimizers, and a box for messages to and from it.

kernels/cpu/device.py and kernels/gpu/arithmetic.py offer it. Arrays are the device's own: NumPy's, or those of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

Array = NDArray[Any]  # or an array of a GPU, which has the same attributes
Result = TypeVar("Result")
Agreed = Callable[["str | None"], "str | None"]  # from what keeps this rank from something to what keeps some rank
BLOCK = 256  # numbers that share an exponent, or a scale, on the wire
SHUT = 4  # in place of which of four pixels won a pool, where ReLU lets no gradient through
FINITE = 0x7FFFFFFF  # in place of the index of a number that is not finite


def output_size(size: int, window: int, stride: int, pad: int) -> int:
    """Length of an axis after windows of `window` elements, `stride` apart, over `size` elements padded by `pad`."""
    return (size + 2 * pad - window) // stride + 1


class Device(Protocol):
    """Memory, and work that is started in order. On the CPU, what is started is done at once."""

    def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> Array: ...
    def upload(self, array: Array, start: int = 0) -> Array:
        """The array on the device: on the CPU itself, else a copy.

        The element `start` of a copy lies at a multiple of 16 bytes.
        """
        ...

    def download(self, array: Array) -> Array:
        """The array on the host, when the work before is done: on the CPU itself, else a copy."""
        ...

    def copy(self, to: Array, source: Array) -> None: ...
    def replayed(self, key: Any, work: Callable[[], Result], agreed: Agreed | None = None) -> Result:
        """What work() gives, which does the same each time it is called with this key; a GPU may record it."""
        ...

    def join(self) -> None: ...
    def mark(self) -> Any: ...
    def wait(self, mark: Any) -> None: ...
    def synchronize(self) -> None: ...


class Mailbox(Protocol):
    """What the host tells a device of a step, and what the device tells of it. Holds two steps, which may overlap."""

    step: Any  # its number, the rule's numbers and the samples (N,), as kernels take them
    numbers: Any
    samples: Any
    bad: Array  # (2,) int32: where this rank's gradient and the sum are first not finite, else FINITE

    def send(self, step: int, numbers: Sequence[float], samples: Any) -> None: ...
    def begin(self, gradient: Array) -> None:
        """What the work for a message starts with: it takes the message, the gradient becomes 0, bad becomes FINITE."""
        ...

    def taken(self) -> None:
        """All work for the last message was started, begin() once in it."""
        ...

    def collect(self, sums: Sequence[Any]) -> None:
        """Start to tell the host `bad` and the sums of a task; none, to leave those that were told before.

        What is told can be read when the device is waited for.
        """
        ...

    def sums(self, step: int) -> Sequence[float]: ...
    def bad_at(self, step: int) -> tuple[int, int]: ...


class Kernels(Protocol):
    """The functions of a device.

    Those of layers are described in kernels/cpu/arithmetic.py and normalization.py, and in kernels/composed.py.
    """

    @property
    def name(self) -> str:
        """cpu or cuda"""
        ...

    @property
    def device(self) -> Any:
        """See Device."""
        ...

    @property
    def evaluation_batch(self) -> int:
        """How many samples to take at a time where nothing is kept."""
        ...

    def conv_forward(self, x: Array, w: Array, b: Array | None, stride: int, pad: int, relu: bool) -> Array: ...
    def conv_backward(
        self, x: Array, y: Array, dy: Array, w: Array, stride: int, pad: int, relu: bool, dw: Array, db: Array | None,
        wants_dx: bool
    ) -> Array | None: ...  # fmt: skip
    def conv_pool_forward(
        self, x: Array, w: Array, b: Array, stride: int, pad: int, relu: bool
    ) -> tuple[Array, Array]: ...
    def conv_pool_backward(
        self, x: Array, winner: Array, dy: Array, w: Array, stride: int, pad: int, relu: bool, dw: Array, db: Array,
        wants_dx: bool
    ) -> Array | None: ...  # fmt: skip
    def conv_norm(
        self, x: Array, w: Array, gamma: Array, beta: Array, epsilon: float, stride: int, pad: int, relu: bool,
        beside: Array | None = None
    ) -> tuple[Array, Array, Array, Any]: ...  # fmt: skip
    def max_pool_forward(self, x: Array, K: int, stride: int, pad: int) -> tuple[Array, Array]: ...
    def max_pool_backward(
        self, dy: Array, winner: Array, K: int, stride: int, pad: int, shape: tuple[int, ...]
    ) -> Array: ...
    def average_pool_forward(self, x: Array, K: int, stride: int, pad: int) -> Array: ...
    def average_pool_backward(self, dy: Array, K: int, stride: int, pad: int, shape: tuple[int, ...]) -> Array: ...
    def pixel_mean(self, x: Array) -> Array: ...
    def pixel_mean_backward(self, dy: Array, shape: tuple[int, ...]) -> Array: ...
    def norm_forward(
        self, x: Array, gamma: Array, beta: Array, epsilon: float, relu: bool
    ) -> tuple[Array, Array, Array]: ...
    def norm_backward(
        self, x: Array, dy: Array, gamma: Array, beta: Array, mean: Array, variance: Array, epsilon: float, relu: bool,
        dgamma: Array, dbeta: Array
    ) -> Array: ...  # fmt: skip
    def norm_follow(
        self, dmean: Array, dvariance: Array, running_mean: Array, running_variance: Array, mean: Array,
        variance: Array, share: float, unbiased: float
    ) -> None: ...  # fmt: skip
    def norm_factors(
        self, gamma: Array, beta: Array, mean: Array, variance: Array, epsilon: float
    ) -> tuple[Array, Array]: ...
    def scale_channels(self, x: Array, factor: Array, offset: Array, relu: bool) -> Array: ...
    def plus(self, x: Array, other: Array, relu: bool) -> Array: ...
    def total(self, parts: Sequence[Array]) -> Array: ...
    def join_channels(self, parts: Sequence[Array]) -> Array: ...
    def split_channels(self, x: Array, sizes: Sequence[int]) -> Sequence[Array]: ...
    def affine_forward(self, x: Array, w: Array, b: Array, relu: bool) -> Array: ...
    def affine_backward(self, x: Array, y: Array, dy: Array, w: Array, relu: bool, dw: Array, db: Array) -> Array: ...
    def relu(self, x: Array) -> Array: ...
    def relu_backward(self, dy: Array, y: Array) -> Array: ...
    def scale(self, x: Array, factor: float) -> Array: ...
    def dropout(self, x: Array, ratio: float, key: tuple[int, int], step: Any, samples: Any) -> Array: ...
    def uniform(self, count: int, key: tuple[int, int], step: Any, samples: Any) -> Array: ...
    def softmax_cross_entropy(
        self, scores: Array, labels: Any, batch: int = 1, smoothing: float = 0.0
    ) -> tuple[Any, Array]: ...
    def warp(self, x: Array, numbers: Array, amounts: Sequence[float]) -> Array: ...

    def mailbox(self, numbers: int, samples: int, sums: int) -> Mailbox:
        """For so many numbers of a rule, samples of a rank and sums of a task."""
        ...

    def gather(self, images: Array, labels: Array, samples: Array) -> tuple[Array, Array]:
        """Of images (N, ...) of the device, bytes as numbers from 0 to 1, and of labels (N, ...), those of the samples.

        labels: from upload_labels.
        """
        ...

    def upload_labels(self, labels: Array) -> Array:
        """Labels of the host, of any integer type, as this device's kernels take them."""
        ...

    def argmax(self, scores: Array) -> Array:
        """The class of the largest score of each row (N, F) -> (N,) int64, on the host."""
        ...

    def update(self, rule: Any, p: Array, g: Array, state: Sequence[Array], numbers: Any, bad: Array) -> None:
        """Make a step of a rule (an Optimizer) of nn/optimizers.py, unless bad[1] says that g is not finite."""
        ...

    def add(self, p: Array, g: Array, bad: Array) -> None:
        """p += g, unless bad[1] says that g is not finite."""
        ...

    def clip(self, gradients: Sequence[Array], most: float, bad: Array) -> None:
        """Make vectors shorter, all by the same factor, where together they are longer than `most` (L2 norm)."""
        ...

    def squared_norm(self, gradient: Array) -> float:
        """The sum of the squares, in float64; NaN where a device would have to be waited for."""
        ...

    def average(self, ema: Array, p: Array, share: Any, bad: Array) -> None:
        """ema += share[0] (p - ema), unless bad[1] says that the gradient was not finite."""
        ...

    def decay(self, p: Array, numbers: Any, bad: Array) -> None:
        """p *= numbers[0], unless bad[1] says that the gradient is not finite."""
        ...

    def checksum(self, vectors: Sequence[Array]) -> int:
        """A sum over the bits of vectors: another if one changes; 0 where none is kept."""
        ...
