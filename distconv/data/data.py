"""Where samples come from: a Dataset (dataset.py), or an object of the user's own that draws them itself."""

from __future__ import annotations

from typing import Any, Protocol


class Data(Protocol):
    """image_shape: of a sample, as the model gets it; classes: what the factory of a model is called with.

    digest: a text that tells whether two ranks, or a run and its checkpoint, have the same data.
    """

    @property
    def image_shape(self) -> tuple[int, ...]: ...

    @property
    def classes(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def size(self, part: str) -> int:
        """How many samples an epoch of train has, and those of test and validation; 0: there is no validation."""
        ...

    def batch(self, part: str, samples: Any, context: Any) -> Any:
        """The samples (N,), numbers from 0 to below size(part), as the task takes them, on the context's device.

        The same whenever it is called with the same ones; context.uniform draws numbers that belong to the samples and
        the step.
        """
        ...


def is_data(candidate: Any) -> bool:
    """Whether this has what Data has, and is not a class."""
    return not isinstance(candidate, type) and all(
        hasattr(candidate, name) for name in ("image_shape", "classes", "digest", "size", "batch")
    )
