"""distconv: synchronous data-parallel training of a convolutional network over MPI.

Importing the package starts nothing: no MPI, no GPU, no compilation. Its one name for other people's scripts is
Allreduce, which is loaded when it is first used.

Letters for shapes, the same in every file:
N samples of a batch, H and W height and width, C channels in, F filters (channels out), K filter or window size,
P ranks. Images and activations are (N, H, W, C); filters are (K, K, C, F).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distconv.comm.allreduce import Allreduce

__all__ = ["Allreduce", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "Allreduce":
        from distconv.comm.allreduce import Allreduce

        return Allreduce
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
