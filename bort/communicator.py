"""One process or many: rank, size, broadcast and allreduce, behind one small interface.

The training loop uses nothing else of Horovod. allreduce always sums: whether the gradients of
Horovod's own trainer hold sums or means depends on the backend it was built with.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Iterator, Protocol, Sequence, TypeVar

import numpy as np

from bort.errors import UserError
from bort.files import lock_folder
from bort.types import NDArray

# Where mpirun and srun say how many processes they start.
LAUNCHERS = (
    *("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE"),
    "SLURM_STEP_NUM_TASKS",
)
# Of a whole job of Slurm, also where its script starts one process without srun.
SLURM_TASKS = "SLURM_NTASKS"

Value = TypeVar("Value")


class Communicator(Protocol):
    """The other processes of a run, as seen from one of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # ranks on this machine

    def broadcast(self, arrays: Sequence[NDArray]) -> None:
        """Overwrite the NDArrays with those of rank 0; waits for the others."""

    def allreduce_(
        self, arrays: Sequence[NDArray], name: str = "sum", compression: str = "none"
    ) -> None:
        """Overwrite each NDArray with its sum over all ranks, without waiting.

        An index of the sequence has to hold the same array at every call of a `name`: the sums of
        one call may not have ended when the next is queued, and only the array keeps them apart.
        With `compression` fp16 the arrays are sent in float16.
        """

    def allreduce(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over all ranks of a small NumPy array; waits for the others."""

    def broadcast_object(self, value: Value) -> Value:
        """Return rank 0's value: plain data, a few megabytes at most."""

    def allgather_object(self, value: Value) -> list[Value]:
        """Return the value of every rank, in their order; waits for the others."""

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""


class SingleProcess:
    """A run of one process."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def broadcast(self, arrays: Sequence[NDArray]) -> None:
        """Do nothing: this is rank 0."""

    def allreduce_(
        self, arrays: Sequence[NDArray], name: str = "sum", compression: str = "none"
    ) -> None:
        """Do nothing: the arrays are the sums."""

    def allreduce(self, values: np.ndarray) -> np.ndarray:
        """Return the values."""
        return values

    def broadcast_object(self, value: Value) -> Value:
        """Return the value."""
        return value

    def allgather_object(self, value: Value) -> list[Value]:
        """Return the value, the only one."""
        return [value]

    def barrier(self) -> None:
        """Return: there is no other rank."""


class Horovod:
    """The processes that `horovodrun` started, over Gloo or NCCL.

    A single process calls none of Horovod's operations: there is nothing to exchange.
    """

    def __init__(self) -> None:
        import horovod.mxnet as hvd

        self._hvd = hvd
        self._join()
        if self.size == 1 and not _started_by_horovodrun():
            # A program for many that is alone in a job for many was started without a launcher.
            step_is_known = "SLURM_STEP_NUM_TASKS" in os.environ
            _refuse_unconnected_processes(LAUNCHERS if step_is_known else (*LAUNCHERS, SLURM_TASKS))

    def _join(self) -> None:
        self._hvd.init()
        self.rank: int = self._hvd.rank()
        self.size: int = self._hvd.size()
        self.local_rank: int = self._hvd.local_rank()
        self.local_size: int = self._hvd.local_size()

    def reinit(self) -> None:
        """Re-initialize Horovod with the current workers: rank and size change.

        Under elastic Horovod only, after a worker was lost or before a new one is admitted.
        """
        self._hvd.shutdown()
        self._join()

    def broadcast(self, arrays: Sequence[NDArray]) -> None:
        """Overwrite the NDArrays with those of rank 0."""
        if self.size == 1:
            return
        for number, array in enumerate(arrays):
            self._hvd.broadcast_(array, root_rank=0, name=f"broadcast.{number}")
        # The next call uses the same names, and two messages of one name must not overlap.
        for array in arrays:
            array.wait_to_read()

    def allreduce_(
        self, arrays: Sequence[NDArray], name: str = "sum", compression: str = "none"
    ) -> None:
        """Overwrite each NDArray with its sum over all ranks, fused into few messages."""
        if self.size == 1:
            return
        for number, array in enumerate(arrays):
            sent = array.astype("float16") if compression == "fp16" else array
            self._hvd.allreduce_(sent, average=False, name=f"{name}.{number}", priority=-number)
            if sent is not array:
                sent.copyto(array)

    def allreduce(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over all ranks; float64 is sent unrounded."""
        from mxnet import nd

        if self.size == 1:
            return values
        array = nd.array(values, dtype="float64")
        return self._hvd.allreduce(array, average=False, name="sum.values").asnumpy()

    def broadcast_object(self, value: Value) -> Value:
        """Return rank 0's value."""
        if self.size == 1:
            return value
        # Named here: Horovod's own name would be that of the type, which differs between ranks.
        return self._hvd.broadcast_object(value, root_rank=0, name="object")

    def allgather_object(self, value: Value) -> list[Value]:
        """Return the value of every rank."""
        if self.size == 1:
            return [value]
        return self._hvd.allgather_object(value, name="objects")

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""
        self.allreduce(np.zeros(1))


def communicator_of_environment() -> Communicator:
    """Return the processes of Horovod when a launcher started several, else a single process.

    Raises `UserError` when Horovod is not there or does not know of the others.
    """
    # mpirun is a launcher for a Horovod that was built with MPI.
    if _started_by_horovodrun() or (_launched(LAUNCHERS) and find_spec("horovod")):
        return Horovod()
    _refuse_unconnected_processes(LAUNCHERS)
    return SingleProcess()


def only_process(program_for_many: str) -> SingleProcess:
    """Return this process; raises `UserError` when a launcher started several."""
    if launched := _launched(("HOROVOD_SIZE", *LAUNCHERS)):
        name, count = launched
        raise UserError(
            f"{name} is {count}, but this program is for one process: start {program_for_many} "
            f"with horovodrun, or unset {name} where only one was started"
        )
    return SingleProcess()


def _started_by_horovodrun() -> bool:
    return "HOROVOD_RANK" in os.environ


def _launched(variables: Sequence[str]) -> tuple[str, int] | None:
    """Return the first variable that counts more than one process, and their number."""
    for name in variables:
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 1:
            return name, int(value)
    return None


def _refuse_unconnected_processes(variables: Sequence[str]) -> None:
    if launched := _launched(variables):
        name, count = launched
        raise UserError(
            f"{name} is {count}, but this process is alone: {count} independent copies would run; "
            "start them with horovodrun, or rebuild Horovod with MPI; where only one was started, "
            f"unset {name}"
        )


@contextmanager
def lock_of_rank_0(folder: str, flag: str, communicator: Communicator) -> Iterator[None]:
    """Hold the lock of a folder on rank 0; see `bort.files.lock_folder`."""
    with lock_folder(folder, flag) if communicator.rank == 0 else nullcontext():
        yield
