"""Training images changed at random, so that a model sees no image twice: turned, shifted, cropped and so on.

What is drawn belongs to the seed, the step and the sample, as all random numbers do here, so any number of ranks draws
the same; images that are evaluated stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distconv.data.data import Data
from distconv.errors import UsageError
from distconv.factory import is_factory, load_taking

DRAWS = 10  # random numbers of an image; kernels/cpu/augmentation.py says what each is for


@dataclass(frozen=True)
class Augmentation:
    """What may happen to an image (H, W, C), all at once, in one resampling (bilinear; 0 outside the image).

    rotate: by up to so many degrees, either way. shift: by up to such a share of the height and of the width. scale:
    larger or smaller by up to such a share, height and width alike. crop: by up to so many whole pixels, as to pad the
    image by them and to cut it out again. flip: 1 to mirror every other image, left to right. brightness: numbers times
    1 plus or minus up to this. erase: a square whose side is such a share of the shorter side becomes 0, its middle
    anywhere in the image (Cutout: DeVries and Taylor 2017, arXiv 1708.04552).
    """

    rotate: float = 0.0
    shift: float = 0.0
    scale: float = 0.0
    crop: float = 0.0
    flip: float = 0.0
    brightness: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            amount, whole = getattr(self, name), name in ("crop", "flip")
            if not 0 <= amount <= most or (whole and amount % 1):
                kind = "a whole number" if whole else "a number"
                raise UsageError(f"--augment {name}={amount:g}: {kind} from 0 to {most:g} was expected")

    def __call__(self, x: Any, context: Any) -> Any:
        """x (N, H, W, C) on the context's device, changed. Raises UsageError where x is no such array of floats."""
        if getattr(x, "ndim", None) != 4 or x.dtype.kind != "f":
            given = f"{x.dtype} of shape {x.shape}" if hasattr(x, "dtype") else f"a {type(x).__name__}"
            raise UsageError(
                f"--augment changes images, floats of shape (N, H, W, C), but the data gave {given}: leave it out"
            )
        return context.kernels.warp(x, context.uniform(DRAWS), dataclasses.astuple(self))


MOST = {"rotate": 180.0, "shift": 1.0, "scale": 0.9, "crop": 1000.0, "flip": 1.0, "brightness": 1.0, "erase": 1.0}
PRESETS = {"mnist": "rotate=15,shift=0.1,scale=0.1", "cifar": "crop=4,flip=1"}


class Augmented:
    """Data whose training images are changed by a function of x and the context."""

    def __init__(self, data: Data, change: Callable[[Any, Any], Any]) -> None:
        self.data, self.change = data, change

    def batch(self, part: str, samples: Any, context: Any) -> Any:
        """See Data. Raises UsageError where a batch is no pair."""
        batch = self.data.batch(part, samples, context)
        if part != "train" or not context.training:
            return batch
        if not isinstance(batch, tuple) or len(batch) != 2:
            raise UsageError(
                "--augment is for data whose batches are images and labels, but these are not: leave it out"
            )
        x, labels = batch
        return self.change(x, context.within("augment")), labels

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)


def named_augmentation(text: str) -> Callable[[Any, Any], Any]:
    """What --augment names: a preset, `rotate=15,flip=1`, or package.module:function. Raises UsageError."""
    if is_factory(text):
        return load_taking(text, None, None)  # x and the context
    amounts: dict[str, float] = {}
    for word in ",".join(PRESETS.get(word.strip(), word) for word in text.split(",")).split(","):
        name, _, amount = word.strip().partition("=")
        if name not in MOST:
            raise UsageError(
                f"--augment {text}: {word.strip()!r} is neither one of {', '.join(PRESETS)} nor of {', '.join(MOST)}"
            )
        try:
            amounts[name] = float(amount or ("1" if name == "flip" else ""))
        except ValueError:
            raise UsageError(f"--augment {text}: {name} takes a number, but {amount!r} was given") from None
    return Augmentation(**amounts)
