"""What is known before a run that takes days: --check prints it and writes nothing."""

from __future__ import annotations

import glob
import io
import os
import platform
import shutil
import tempfile
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import Any, Callable, NamedTuple

import gluonnlp as nlp
import mxnet as mx
import numpy as np
from mxnet import nd

from bort import checkpoint
from bort.bort import parameter_count
from bort.communicator import Communicator
from bort.devices import devices_of
from bort.errors import UserError
from bort.mxnet_setup import cpu_threads, usable_cores
from bort.pretraining.config import PretrainingSettings
from bort.pretraining.run import Pretraining, open_data
from bort.pretraining.teacher import LiveTeacher
from bort.pretraining.teacher_cache import read_cache_manifest

# What the project is written for: GluonNLP 0.9 and earlier compute another attention.
NEEDED = {"MXNet": "1.9.", "GluonNLP": "0.10."}
# Updates that are timed, after the first, in which memory is found and kernels are chosen.
TIMED_UPDATES = 5
# Besides those of --keep_checkpoints: the best one, and the one being written.
MORE_CHECKPOINTS = 2


class Row(NamedTuple):
    """One line of the table; `wrong` says what is to be mended."""

    name: str
    value: str
    wrong: bool = False


Stage = Callable[[], list[Row]]


class Preflight:
    """Looks at everything a run needs, in the order in which one thing needs the other."""

    def __init__(self, settings: PretrainingSettings, communicator: Communicator) -> None:
        self.settings = settings
        self.communicator = communicator
        self.rows: list[Row] = []
        self._run: Pretraining | None = None

    def check(self) -> list[Row]:
        """Go through all stages up to the first that fails on any rank; returns the rows."""
        stages: list[tuple[str, Stage]] = [
            ("versions", self._versions),
            ("processes", self._processes),
            ("device", self._device),
            ("data", self._data),
            ("folder", self._folder),
            ("networks", self._networks),
            ("disk", self._disk),
            ("speed", self._speed),
        ]
        for name, stage in stages:
            try:
                self.rows += stage()
            except UserError as error:
                self.rows.append(Row(name, str(error), wrong=True))
            wrong = sum(row.wrong for row in self.rows)
            # Together: the stages to come talk to the other ranks.
            elsewhere = int(self.communicator.sum(np.array([float(wrong)]))[0]) - wrong
            if elsewhere and not wrong:
                self.rows.append(Row(name, f"{elsewhere} mistake(s) on other ranks", wrong=True))
            if wrong or elsewhere:
                break
        return self.rows

    def _versions(self) -> list[Row]:
        found = {"MXNet": mx.__version__, "GluonNLP": nlp.__version__}
        rows = [Row("Python", platform.python_version()), Row("NumPy", np.__version__)]
        for name, version in found.items():
            wrong = not version.startswith(NEEDED[name])
            needed = f", {NEEDED[name]}* is needed: run scripts/setup_env.sh" * wrong
            rows.append(Row(name, version + needed, wrong))
        return rows

    def _processes(self) -> list[Row]:
        size = self.communicator.size
        if size == 1:
            return [Row("processes", "1")]
        import horovod

        # A Horovod built for another MXNet is loaded, too, but does not add up.
        total = int(self.communicator.sum(np.array([self.communicator.rank + 1.0]))[0])
        wrong = total != size * (size + 1) // 2
        what = "does not add up over its ranks: build it anew for this MXNet" if wrong else "works"
        return [
            Row("Horovod", f"{horovod.__version__}, {what}", wrong),
            Row("processes", f"{size}"),
        ]

    def _device(self) -> list[Row]:
        run = self.settings.run
        devices = devices_of(run.gpus, run.cpu_contexts, self.communicator)
        there = mx.context.num_gpus()
        if run.gpus is not None and any(device.device_id >= there for device in devices):
            raise UserError(f"--gpus {run.gpus}: MXNet sees {there} GPU(s) here")
        names = ", ".join(map(str, devices))
        if run.gpus is not None:
            free = [mx.context.gpu_memory_info(device.device_id)[0] for device in devices]
            names += f", {min(free) / 2**30:.1f} GiB free"
        threads = f"{cpu_threads()} of {usable_cores()} cores"
        return [Row("devices a process", names), Row("OpenMP threads", threads)]

    def _data(self) -> list[Row]:
        source, held_out, manifest = open_data(self.settings)
        accumulate = self.settings.data.accumulate
        updates = source.batches_per_epoch / (accumulate * self._workers())
        epochs = self.settings.optimizer.num_steps / updates
        tokenizer = manifest.tokenizer.get("name", "tokenizer")
        rows = [
            Row("tokenizer", f"{tokenizer} {manifest.tokenizer_fingerprint[:12]}"),
            Row("vocabulary", f"{manifest.vocab_size:,}"),
            Row("sequences", f"{manifest.totals['sequences']:,}"),
            Row("tokens", f"{manifest.totals['tokens']:,}"),
            Row("micro-batches an epoch", f"{source.batches_per_epoch:,}"),
            Row("updates an epoch", f"{updates:,.1f}"),
            Row("epochs planned", f"{epochs:,.2f}"),
        ]
        if held_out is not None:
            rows.append(Row("held out", f"{held_out.batches_per_epoch:,} batches, same tokenizer"))
        return rows

    def _folder(self) -> list[Row]:
        folder = self.settings.run.ckpt_dir
        start = f"from step {self._start()}"
        return [Row("checkpoints", f"{folder}, {start}")]

    def _networks(self) -> list[Row]:
        """Build the run; that teacher, student and shards have one vocabulary is found out here."""
        scratch = replace(self.settings.run, ckpt_dir="", resume=False, start_step=0)
        self._run = Pretraining(self.settings._replace(run=scratch), self.communicator)
        name = self.settings.student.student_model
        rows = [Row("student", f"{name}, {parameter_count(self._run.student):,} parameters")]
        teacher = self.settings.teacher
        if teacher.teacher_cache:
            cached = read_cache_manifest(teacher.teacher_cache)
            text = f"{cached.teacher_model} from the cache, {cached.dtype}, same vocabulary"
            return [*rows, Row("teacher", text)]
        if isinstance(self._run.teacher, LiveTeacher):
            return [*rows, Row("teacher", f"{teacher.teacher_model}, same vocabulary")]
        return [*rows, Row("teacher", "none")]

    def _disk(self) -> list[Row]:
        run = self._run
        assert run is not None
        parameters = [p.data(run.devices[0]) for p in run.student.collect_params().values()]
        arrays = [*parameters, *run.trainer.state().values()]
        size = sum(array.size * np.dtype(array.dtype).itemsize for array in arrays)
        folder = self.settings.run.ckpt_dir
        there = len(glob.glob(os.path.join(glob.escape(folder), "step-*")))
        planned = self.settings.run.keep_checkpoints + MORE_CHECKPOINTS
        needed, free = size * max(1, planned - there), _free_bytes(folder)
        text = (
            f"{needed / 1e9:,.2f} GB for checkpoints of {size / 1e9:,.3f}, {free / 1e9:,.1f} free"
        )
        cure = "; make room or lower --keep_checkpoints" * (needed > free)
        return [Row("disk", text + cure, needed > free)]

    def _speed(self) -> list[Row]:
        assert self._run is not None
        first, seconds, tokens = time_updates(self._run)
        left = self.settings.optimizer.num_steps - self._start()
        hours = left * seconds / 3600
        gpus = self.settings.run.gpus is not None
        width = self._workers() if gpus else self.communicator.size * cpu_threads()
        return [
            Row("first update", f"{first:,.2f} s"),
            Row("further updates", f"{seconds:,.3f} s each"),
            Row("tokens/s", f"{tokens / seconds:,.0f}"),
            Row("to the end", f"{hours:,.2f} h for {left:,} updates, without evaluations"),
            Row("GPU-hours" if gpus else "core-hours", f"{hours * width:,.2f}"),
        ]

    def _workers(self) -> int:
        run = self.settings.run
        devices = devices_of(run.gpus, run.cpu_contexts, self.communicator)
        return self.communicator.size * len(devices)

    def _start(self) -> int:
        """Return the step the run would start from; raises what the run itself would raise."""
        run = self.settings.run
        found = None
        if run.start_step:
            found = checkpoint.at_step(run.ckpt_dir, run.start_step)
        elif run.resume:
            found = checkpoint.latest(run.ckpt_dir)
        else:
            checkpoint.require_none(run.ckpt_dir)
        return found.state["step"] if found else 0


def time_updates(run: Pretraining) -> tuple[float, float, float]:
    """Make some updates of a new run in a folder that vanishes.

    Returns the seconds of the first update, those of each further one, and the mean number of
    tokens in one of these, of all ranks together.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        run.settings = run.settings._replace(run=replace(run.settings.run, ckpt_dir=folder))
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            run.begin()
        batches = run.batches()
        stack.callback(batches.close)
        first = _timed(run, batches, 1)
        start = run.position
        seconds = _timed(run, batches, TIMED_UPDATES)
        tokens = sum(run.source(number).tokens for number in range(start, run.position))
    return first, seconds / TIMED_UPDATES, tokens / TIMED_UPDATES


def _timed(run: Pretraining, batches: Any, updates: int) -> float:
    start = time.perf_counter()
    for _ in range(updates):
        run.train_step(batches)
    nd.waitall()
    return time.perf_counter() - start


def _free_bytes(folder: str) -> int:
    """Return the free space where a folder is or will be."""
    path = os.path.abspath(folder)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def table(rows: list[Row]) -> str:
    """Return the rows as an aligned table, wrong ones marked."""
    width = max(len(row.name) for row in rows)
    return "\n".join(
        f"{'WRONG' if row.wrong else 'ok':<5}  {row.name:<{width}}  {row.value}" for row in rows
    )


def preflight(settings: PretrainingSettings, communicator: Communicator) -> None:
    """Check a run and print the table on rank 0; raises `UserError` when something is wrong."""
    rows = Preflight(settings, communicator).check()
    wrong = [row.name for row in rows if row.wrong]
    if communicator.rank == 0:
        print(table(rows), flush=True)
    communicator.barrier()
    if wrong:
        raise UserError(f"--check: wrong: {', '.join(wrong)} (see the table); nothing was started")
