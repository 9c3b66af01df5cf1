"""Signs of life between hosts. One rank of each host tells the job's rank 0 how it is there, and that one answers.

MPI carries them, from the thread that watches, so there is no port to open and no other network to configure.
"""

from __future__ import annotations

from typing import Any


class Heartbeat:
    """Between the ranks of comm, one of each host, of which rank 0 is the centre; collective.

    nbytes: of this host's messages; those of all hosts get the length of the longest.
    """

    def __init__(self, comm: Any, nbytes: int) -> None:
        self.comm = comm
        self.nbytes = max(comm.allgather(nbytes))
        self.others = list(range(1, comm.size)) if comm.rank == 0 else [0]
        self.sending: dict[int, Any] = {}  # the last message to each, until it has left
        self.sent, self.received = [0] * comm.size, [0] * comm.size

    def exchange(self, message: bytes) -> dict[int, bytes]:
        """Send to each whose last message has left; returns what has come since, the last of each."""
        came = {}
        for other in self.others:
            while self.comm.Iprobe(source=other):
                came[other] = self._receive(other)
            request, _ = self.sending.get(other, (None, None))
            if request is None or request.Test():
                buffer = bytearray(message.ljust(self.nbytes, b"\0"))
                self.sending[other] = self.comm.Isend(buffer, dest=other), buffer
                self.sent[other] += 1
        return came

    def close(self) -> None:
        """Receive what is still on its way; collective, when nobody exchanges any more."""
        counts = self.comm.allgather(self.sent)
        for other in self.others:
            while self.received[other] < counts[other][self.comm.rank]:
                self._receive(other)
        for request, _ in self.sending.values():
            request.Wait()

    def _receive(self, other: int) -> bytes:
        buffer = bytearray(self.nbytes)
        self.comm.Recv(buffer, source=other)
        self.received[other] += 1
        return bytes(buffer)
