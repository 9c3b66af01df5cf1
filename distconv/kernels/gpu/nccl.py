"""NCCL through CuPy: bytes from GPU to GPU. CuPy is imported when this is used, not with this file."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

Array = Any  # on the device


def library() -> Any:
    """CuPy's NCCL, without CuPy's warning where its library is missing: those who ask say so themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl
    return nccl


def written(number: int) -> str:
    """The number of a version as people write it."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


class Nccl:
    """Carries bytes between GPUs, in the stream's turn; see Transport in comm/on_gpu.py."""

    name = "NCCL"
    needs_no_host = True

    def __init__(self, size: int, rank: int, identity: Any, stream: Any, recordings: dict[Any, Any]) -> None:
        """Collective over the ranks. recordings: of the device, whose graphs may use this."""
        self.library, self.size, self.rank, self.stream = library(), size, rank, stream
        self.communicator = self.library.NcclCommunicator(size, identity, rank)
        # When nobody has it any more, or Python ends, which lets objects go in any order.
        weakref.finalize(self, _leave, self.communicator, recordings)

    def scatter(self, outgoing: Array, received: Array) -> None:
        """Row r of outgoing (P, nbytes) goes to rank r."""
        byte, stream, nbytes = self.library.NCCL_UINT8, self.stream.ptr, outgoing.shape[1]
        self.library.groupStart()
        try:
            for peer in range(self.size):
                if peer != self.rank:
                    self.communicator.send(outgoing[peer].data.ptr, nbytes, byte, peer, stream)
                    self.communicator.recv(received[peer].data.ptr, nbytes, byte, peer, stream)
        finally:  # what comes after would else wait for the end of the group
            self.library.groupEnd()

    def gather(self, mine: Array, gathered: Array) -> None:
        """mine (nbytes,), this rank's row of gathered (P, nbytes), becomes that row on every rank."""
        self.communicator.allGather(
            mine.data.ptr, gathered.data.ptr, mine.nbytes, self.library.NCCL_UINT8, self.stream.ptr
        )


def _leave(communicator: Any, recordings: dict[Any, Any]) -> None:
    """End a communicator. NCCL waits until the graphs that use it are gone, so they go first."""
    recordings.clear()
    communicator.destroy()
