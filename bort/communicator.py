"""One process or many: rank, size, broadcast and sum, behind one small interface.

The training loops know nothing else of Horovod. Sums are asked for as sums: whether the gradients
of Horovod's own trainer hold sums or means depends on the backend it was built with.
"""

from __future__ import annotations

import os
from typing import Any, Protocol, Sequence

import numpy as np


class Communicator(Protocol):
    """The other processes of a run, as seen from one of them."""

    rank: int
    size: int
    local_rank: int

    def broadcast(self, arrays: Sequence[Any]) -> None:
        """Overwrite the NDArrays with those of rank 0; waits for the others."""

    def allreduce_(self, arrays: Sequence[Any], compression: str = "none") -> None:
        """Overwrite each NDArray with its sum over all ranks, without waiting.

        A place in the sequence has to hold the same array at every call: the sums of one call may
        still be under way when the next is queued, and only the array keeps them apart.
        `compression` fp16 halves what travels of all but the last, which counts positions.
        """

    def allreduce(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over all ranks of a small NumPy array; waits for the others."""

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value: plain data, a few megabytes at most."""

    def allgather_object(self, value: Any) -> list[Any]:
        """Return the value of every rank, in their order; waits for the others."""

    def barrier(self) -> None:
        """Wait until every rank has come here."""


class SingleProcess:
    """A run of one process."""

    rank = 0
    size = 1
    local_rank = 0

    def broadcast(self, arrays: Sequence[Any]) -> None:
        """Nothing to overwrite: this is rank 0."""

    def allreduce_(self, arrays: Sequence[Any], compression: str = "none") -> None:
        """Nothing to add."""

    def allreduce(self, values: np.ndarray) -> np.ndarray:
        """Return the values."""
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Return the value."""
        return value

    def allgather_object(self, value: Any) -> list[Any]:
        """Return the value, the only one."""
        return [value]

    def barrier(self) -> None:
        """Nobody to wait for."""


class Horovod:
    """The processes that `horovodrun` started, over Gloo or NCCL."""

    def __init__(self) -> None:
        import horovod.mxnet as hvd

        self._hvd = hvd
        self._join()

    def _join(self) -> None:
        self._hvd.init()
        self.rank: int = self._hvd.rank()
        self.size: int = self._hvd.size()
        self.local_rank: int = self._hvd.local_rank()

    def reinit(self) -> None:
        """Leave, and meet the processes there are now: rank and size change.

        Under elastic Horovod only, after a process was lost or before a new one is let in.
        """
        self._hvd.shutdown()
        self._join()

    def broadcast(self, arrays: Sequence[Any]) -> None:
        """Overwrite the NDArrays with those of rank 0."""
        for number, array in enumerate(arrays):
            self._hvd.broadcast_(array, root_rank=0, name=f"broadcast.{number}")
        # The next call uses the same names, and two messages of one name must not be under way.
        for array in arrays:
            array.wait_to_read()

    def allreduce_(self, arrays: Sequence[Any], compression: str = "none") -> None:
        """Overwrite each NDArray with its sum over all ranks, fused into few messages."""
        last = len(arrays) - 1
        for number, array in enumerate(arrays):
            name = f"sum.{number}"
            if compression == "fp16" and number < last:
                narrow = array.astype("float16")
                self._hvd.allreduce_(narrow, average=False, name=name, priority=-number)
                narrow.copyto(array)
            else:
                self._hvd.allreduce_(array, average=False, name=name, priority=-number)

    def allreduce(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over all ranks; float64 goes over the wire unrounded."""
        from mxnet import nd

        array = nd.array(values, dtype="float64")
        return self._hvd.allreduce(array, average=False, name="sum.values").asnumpy()

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value."""
        # Named here: Horovod's own name would be that of the type, which differs between ranks.
        return self._hvd.broadcast_object(value, root_rank=0, name="object")

    def allgather_object(self, value: Any) -> list[Any]:
        """Return the value of every rank."""
        return self._hvd.allgather_object(value, name="objects")

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.allreduce(np.zeros(1))


def communicator_of_environment() -> Communicator:
    """Return Horovod's processes when `horovodrun` started this one, else a single process."""
    return Horovod() if "HOROVOD_RANK" in os.environ else SingleProcess()
