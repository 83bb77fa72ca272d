"""Elastic training: tolerates lost workers and admits new ones.

Horovod's elastic training covers other frameworks. Its framework-independent wrapper needs a state
that it can save and restore: here a copy in the memory of every worker, made after each metric line
(`--log_interval`). Parameters and moments in float32 are 12 bytes a parameter, 0.9 GB for Bort, too
much to copy at every step. A lost worker costs at most the steps since the last metric line.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack, contextmanager, suppress
from typing import Iterator

import mxnet as mx
import numpy as np
from horovod.common import elastic
from horovod.common.exceptions import HorovodInternalError
from mxnet import nd

from bort.communicator import Horovod
from bort.devices import memory_errors
from bort.errors import UserError
from bort.files import await_unlocked, lock_folder
from bort.pretraining.config import PretrainingSettings
from bort.pretraining.run import MEMORY_CURE, checked_devices, pretraining_loop
from bort.reporter import FolderReporter
from bort.training.job import Metrics
from bort.training.loop import Loop
from bort.types import JSONObject

# Whose error messages mean that a sum or broadcast failed. Other errors, such as lack of memory,
# would be raised again after every restart.
COLLECTIVE_FAILURE = re.compile("Horovod|gloo|nccl", re.IGNORECASE)
# That a new rank 0 waits for the lock of the one before: it may be about to end, or a file server
# may not know yet that its machine was lost.
LOCK_SECONDS = 120.0


class ElasticState(elastic.State):
    """A run as Horovod's wrapper sees it: saved in memory, restored, made equal on all ranks."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop.communicator.broadcast_object, lambda: loop.communicator.rank)
        self.loop = loop
        self.lock = ExitStack()  # of the run's folder, held by rank 0
        self._locked = False
        self._saved: tuple[JSONObject, list[np.ndarray]] | None = None

    def save(self) -> None:
        """Copy progress, parameters and optimizer's state; waits for the device."""
        self._saved = self.loop.state(), [array.asnumpy() for array in self.loop.arrays()]

    def restore(self) -> None:
        """Go back to what was saved."""
        # Arrays that a failed sum was to fill refuse to be written until its error has been seen.
        with suppress(mx.MXNetError):
            nd.waitall()
        if self._saved:
            state, arrays = self._saved
            self.loop.load_state(state)
            for array, saved in zip(self.loop.arrays(), arrays):
                array[:] = saved

    def sync(self) -> None:
        """Take over what rank 0 has; at the start of the job, that is what it was told to resume.

        Horovod gives rank 0 to a worker that was there before, if any is left.
        """
        self.lock_folder()
        with lost_workers():
            if self._saved is None:
                self.loop.load_checkpoint()
            self.loop.broadcast_state()
            self.save()

    def lock_folder(self) -> None:
        """Lock the folder of the run once this process is rank 0, also after rank 0 was lost.

        Raises `UserError` when another process still holds the lock after `LOCK_SECONDS`; at the
        start of the job, it is that of another run, and at once.
        """
        if self.loop.communicator.rank == 0 and not self._locked:
            folder = self.loop.job.saving.folder
            if self._saved is not None:
                await_unlocked(folder, LOCK_SECONDS)
            self.lock.enter_context(lock_folder(folder, "--ckpt_dir"))
            self._locked = True


@contextmanager
def lost_workers() -> Iterator[None]:
    """Turn MXNet's error about a failed sum or broadcast into the one that Horovod waits for."""
    try:
        yield
    except mx.MXNetError as error:
        if COLLECTIVE_FAILURE.search(str(error)):
            raise HorovodInternalError(str(error)) from error
        raise


def run_elastic(settings: PretrainingSettings, communicator: Horovod) -> list[Metrics]:
    """Train like `bort.pretraining.run.pretrain`, while workers are lost and added.

    An update takes the same micro-batches with any number of workers, so losing one changes only
    the rounding of sums. Returns the evaluations since the workers last changed. Raises `UserError`
    when `horovodrun` was not told how to discover hosts.
    """
    if os.environ.get("HOROVOD_ELASTIC") != "1":
        raise UserError(
            "--elastic: horovodrun needs --host-discovery-script: see scripts/README.md"
        )
    devices = checked_devices(settings, communicator)
    reporter = FolderReporter(settings.run.ckpt_dir, communicator)
    with memory_errors(MEMORY_CURE):
        state = ElasticState(pretraining_loop(settings, communicator, devices, reporter))
        with state.lock:
            return elastic.run_fn(_train, communicator.reinit)(state)


def _train(state: ElasticState) -> list[Metrics]:
    state.lock_folder()  # Horovod does not call `sync` where hosts were only taken away
    with lost_workers():
        # Workers that have joined a run which began with fewer must not end it.
        state.loop.start(may_idle=True)
        evaluations = state.loop.train(state.commit)
        # A broadcast does not wait on rank 0, which must not leave before the others have it.
        nd.waitall()
        state.loop.communicator.barrier()
    return evaluations
