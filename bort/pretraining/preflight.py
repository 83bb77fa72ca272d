"""--check: prints what is known of a run before it starts, times some updates, writes nothing."""

from __future__ import annotations

import glob
import os
import platform
import shutil
import time
from contextlib import closing
from typing import Callable, Iterator, NamedTuple, Optional, Sequence

import gluonnlp as nlp
import mxnet as mx
import numpy as np
from mxnet import nd

from bort import checkpoint
from bort.bort import parameter_count
from bort.communicator import Communicator
from bort.devices import memory_errors
from bort.errors import UserError
from bort.mxnet_setup import cpu_threads, usable_cores
from bort.pretraining.config import PretrainingSettings
from bort.pretraining.run import (
    MEMORY_CURE,
    Inputs,
    checked_devices,
    open_data,
    pretraining_loop,
)
from bort.pretraining.teacher_cache import read_cache_manifest
from bort.reporter import NullReporter
from bort.training.loop import Loop, MicroBatch
from bort.types import Context

# The versions the project is written for: GluonNLP 0.9 and earlier compute another attention.
NEEDED = {"MXNet": "1.9.", "GluonNLP": "0.10."}
# Updates that are timed, after the first, in which memory is found and kernels are chosen.
TIMED_UPDATES = 5
# Besides those of --keep_checkpoints: the best one, and the one being written.
MORE_CHECKPOINTS = 2


class Row(NamedTuple):
    """One line of the table."""

    name: str
    value: str
    failed: bool = False


class Preflight:
    """Checks everything a run needs, each part after those it depends on."""

    def __init__(self, settings: PretrainingSettings, communicator: Communicator) -> None:
        self.settings = settings
        self.communicator = communicator
        self.rows: list[Row] = []
        self._devices: list[Context] = []
        self._found: Optional[checkpoint.Checkpoint] = None  # the one to be resumed, on rank 0

    def check(self) -> list[Row]:
        """Go through all stages up to the first that fails on any rank; returns the rows."""
        stages: list[tuple[str, Callable[[], list[Row]]]] = [
            ("versions", version_rows),
            ("processes", lambda: process_rows(self.communicator)),
            ("device", self._device_rows),
            ("data", self._data_rows),
            ("folder", self._folder_rows),
            ("networks", self._network_rows),
            ("updates", self._update_rows),
            ("disk", self._disk_rows),
            ("speed", self._speed_rows),
        ]
        for name, stage in stages:
            try:
                with memory_errors(MEMORY_CURE):
                    self.rows += stage()
            except UserError as error:
                self.rows.append(Row(name, str(error), failed=True))
            failed = sum(row.failed for row in self.rows)
            # Together: the next stages communicate with the other ranks.
            elsewhere = int(self.communicator.allreduce(np.array([float(failed)]))[0]) - failed
            if elsewhere and not failed:
                self.rows.append(Row(name, f"{elsewhere} failure(s) on other ranks", failed=True))
            if failed or elsewhere:
                break
        return self.rows

    def _device_rows(self) -> list[Row]:
        self._devices = checked_devices(self.settings, self.communicator)
        return device_rows(self._devices)

    def _data_rows(self) -> list[Row]:
        settings = self.settings
        return data_rows(
            open_data(settings.data, settings.run.seed, settings.teacher.teacher_cache)
        )

    def _folder_rows(self) -> list[Row]:
        """Open the checkpoint to be resumed, on rank 0: other machines need not have the folder."""
        run = self.settings.run
        if self.communicator.rank == 0:
            self._found = checkpoint.requested(run.ckpt_dir, run.resume, run.start_step)
        self._start = self._found.state["step"] if self._found else 0
        return [Row("checkpoints", f"{run.ckpt_dir}, from step {self._start}")]

    def _network_rows(self) -> list[Row]:
        """Build the run, which verifies that teacher, student and shards have one vocabulary.

        Compares it with the checkpoint that it is to resume.
        """
        self._loop = pretraining_loop(
            self.settings, self.communicator, self._devices, NullReporter()
        )
        if self._found:
            self._loop.check_resume(self._found)
        name = self.settings.student.student_model
        parameters = parameter_count(self._loop.job.network)
        teacher = self.settings.teacher
        found = "none"
        if teacher.teacher_cache:
            cached = read_cache_manifest(teacher.teacher_cache)
            found = f"{cached.teacher_model} from the cache, {cached.dtype}, same vocabulary"
        elif teacher.teacher_model:
            found = f"{teacher.teacher_model}, same vocabulary"
        return [Row("student", f"{name}, {parameters:,} parameters"), Row("teacher", found)]

    def _update_rows(self) -> list[Row]:
        """Return how often the updates use the data, those before a checkpoint included.

        A run that is resumed with other workers keeps the micro-batches of an update.
        """
        per_epoch = self._loop.job.stream.source.batches_per_epoch
        before = self._found.state["position"] if self._found else 0
        left = max(0, self.settings.optimizer.num_steps - self._start)
        batches = before + left * self._loop.micro_batches
        return [
            Row("updates per epoch", f"{per_epoch / self._loop.micro_batches:,.1f}"),
            Row("epochs planned", f"{batches / per_epoch:,.2f}"),
        ]

    def _disk_rows(self) -> list[Row]:
        parameters = self._loop.job.network.collect_params().values()
        arrays = [p.data(self._devices[0]) for p in parameters]
        arrays += self._loop.trainer.state().values()
        size = sum(array.size * np.dtype(array.dtype).itemsize for array in arrays)
        run = self.settings.run
        return [disk_row(run.ckpt_dir, size, run.keep_checkpoints + MORE_CHECKPOINTS)]

    def _speed_rows(self) -> list[Row]:
        first, seconds, tokens = time_updates(self._loop)
        left = max(0, self.settings.optimizer.num_steps - self._start)
        hours = left * seconds / 3600
        gpus = self.settings.run.gpus is not None
        width = self._workers if gpus else self.communicator.size * cpu_threads()
        return [
            Row("first update", f"{first:,.2f} s"),
            Row("further updates", f"{seconds:,.3f} s each"),
            Row("tokens/s", f"{tokens / seconds:,.0f}"),
            Row("to the end", f"{hours:,.2f} h for {left:,} updates, without evaluations"),
            Row("GPU-hours" if gpus else "core-hours", f"{hours * width:,.2f}"),
        ]

    @property
    def _workers(self) -> int:
        return self.communicator.size * len(self._devices)


def version_rows() -> list[Row]:
    """Return the versions of Python and of the packages that matter."""
    found = {"MXNet": mx.__version__, "GluonNLP": nlp.__version__}
    rows = [Row("Python", platform.python_version()), Row("NumPy", np.__version__)]
    for name, version in found.items():
        failed = not version.startswith(NEEDED[name])
        needed = f", {NEEDED[name]}* is needed: run scripts/setup_env.sh" * failed
        rows.append(Row(name, version + needed, failed))
    return rows


def process_rows(communicator: Communicator) -> list[Row]:
    """Return the number of processes, and whether Horovod adds up over them."""
    size = communicator.size
    if size == 1:
        return [Row("processes", "1")]
    import horovod

    # Without NCCL gradients of GPUs travel through the memory of the host.
    import horovod.mxnet as hvd

    transport = "NCCL" if hvd.nccl_built() else "without NCCL: GPU gradients go through the host"
    # A Horovod built for another MXNet can be imported, too, but its sums are wrong.
    total = int(communicator.allreduce(np.array([communicator.rank + 1.0]))[0])
    failed = total != size * (size + 1) // 2
    what = "its sums are wrong: rebuild it for this MXNet" if failed else "works"
    return [
        Row("Horovod", f"{horovod.__version__}, {transport}, {what}", failed),
        Row("processes", f"{size}"),
    ]


def device_rows(devices: Sequence[Context]) -> list[Row]:
    """Return the devices of a process, and its threads."""
    names = ", ".join(map(str, devices))
    if devices[0].device_type == "gpu":
        free = [mx.context.gpu_memory_info(device.device_id)[0] for device in devices]
        names += f", {min(free) / 2**30:.1f} GiB free"
    threads = f"{cpu_threads()} of {usable_cores()} cores"
    return [Row("devices per process", names), Row("OpenMP threads", threads)]


def data_rows(inputs: Inputs) -> list[Row]:
    """Describe the shards."""
    training, held_out, manifest = inputs.training, inputs.held_out, inputs.manifest
    tokenizer = manifest.tokenizer.name
    rows = [
        Row("tokenizer", f"{tokenizer} {manifest.tokenizer_fingerprint[:12]}"),
        Row("vocabulary", f"{manifest.vocab_size:,}"),
        Row("sequences", f"{manifest.totals['sequences']:,}"),
        Row("tokens", f"{manifest.totals['tokens']:,}"),
        Row("micro-batches per epoch", f"{training.batches_per_epoch:,}"),
    ]
    if held_out is not None:
        rows.append(Row("held out", f"{held_out.batches_per_epoch:,} batches, same tokenizer"))
    return rows


def disk_row(folder: str, size: int, checkpoints: int) -> Row:
    """Compare the free space with what `checkpoints` of `size` bytes need."""
    there = len(glob.glob(os.path.join(glob.escape(folder), "step-*")))
    needed, free = size * max(1, checkpoints - there), _free_bytes(folder)
    text = f"{needed / 1e9:,.2f} GB for checkpoints of {size / 1e9:,.3f}, {free / 1e9:,.1f} free"
    cure = "; free some space or lower --keep_checkpoints" * (needed > free)
    return Row("disk", text + cure, needed > free)


def time_updates(loop: Loop) -> tuple[float, float, float]:
    """Make some updates of a new run; a checkpoint is neither read nor written.

    Returns the seconds of the first update, those of each further one, and the mean number of
    tokens in one of these, of all ranks together.
    """
    loop.broadcast_state()
    loop.start()
    with closing(loop.batches()) as batches:
        first = _timed(loop, batches, 1)
        start = loop.progress.batches
        seconds = _timed(loop, batches, TIMED_UPDATES)
    source = loop.job.stream.source
    tokens = sum(source(number).tokens for number in range(start, loop.progress.batches))
    return first, seconds / TIMED_UPDATES, tokens / TIMED_UPDATES


def _timed(loop: Loop, batches: Iterator[MicroBatch], updates: int) -> float:
    start = time.perf_counter()
    for _ in range(updates):
        loop.train_step(batches)
    nd.waitall()
    return time.perf_counter() - start


def _free_bytes(folder: str) -> int:
    """Return the free space where a folder is or will be."""
    path = os.path.abspath(folder)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def table(rows: list[Row]) -> str:
    """Return the rows as an aligned table; failed ones are marked."""
    width = max(len(row.name) for row in rows)
    return "\n".join(
        f"{'FAIL' if row.failed else 'ok':<5}  {row.name:<{width}}  {row.value}" for row in rows
    )


def preflight(settings: PretrainingSettings, communicator: Communicator) -> None:
    """Check a run and print the table on rank 0; raises `UserError` when something failed."""
    rows = Preflight(settings, communicator).check()
    failed = [row.name for row in rows if row.failed]
    if communicator.rank == 0:
        print(table(rows), flush=True)
    communicator.barrier()
    if failed:
        raise UserError(f"--check: failed: {', '.join(failed)} (see the table); nothing was run")
