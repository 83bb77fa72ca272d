"""Data loading: time that training waits for data, growth of memory, leftover processes.

    python scripts/benchmark.py starvation [--megabytes 500] [--passes 50]

First, two workers train a small student on two shards of `--megabytes` each: the share of the time
that they wait for data. Then they train on a few sequences for `--passes` epochs: their private
memory after a fifth of the epochs and at the end, and the processes that remain afterwards.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import NamedTuple, Optional, Sequence

from benchmarks.workers import metric_lines, require_success, start_training, write_shards
from bort.config import option, parse
from bort.errors import UserError
from bort.types import JSONObject

_WORKERS = 2
_VOCABULARY = 50265
# Of the two offsets of a sequence in a shard.
_BYTES_OF_OFFSETS = 16


@dataclass(frozen=True)
class StarvationBenchmarkSettings:
    """Training and data."""

    student_model: str = option("bort_2_4_512_256", "shape; smaller ones need more data per second")
    megabytes: int = option(500, "size of each of the two shards, in MB", minimum=1)
    length: int = option(128, "tokens per sequence", minimum=8, maximum=512)
    batch_size: int = option(4, "sequences per worker and update", minimum=1)
    steps: int = option(120, "updates on the large shards", minimum=20)
    passes: int = option(50, "epochs over the few sequences", minimum=5)
    sequences: int = option(48, "number of these sequences", minimum=8)


class Measurement(NamedTuple):
    """The measured values."""

    waiting: float  # share of the time
    memory: list[float]  # MB of all workers, after a fifth of the epochs and at the end
    left_behind: int  # number of processes


def main(argv: Optional[Sequence[str]] = None) -> Measurement:
    """Measure, print, return the numbers."""
    (settings,) = parse(str(__doc__), argv, StarvationBenchmarkSettings)
    with tempfile.TemporaryDirectory() as folder:
        waiting = _waiting(settings, folder)
        memory, left_behind = _passes(settings, folder)
    print(
        f"{settings.passes} epochs: memory of {_WORKERS} workers after a fifth of them and at the"
    )
    print(f"end: {memory[0]:,.0f} and {memory[1]:,.0f} MB; remaining processes: {left_behind}")
    return Measurement(waiting, memory, left_behind)


def _waiting(settings: StarvationBenchmarkSettings, folder: str) -> float:
    size = settings.length * 2 + 4 * round(0.15 * settings.length) + _BYTES_OF_OFFSETS
    shards, run = os.path.join(folder, "large"), os.path.join(folder, "large-run")
    write_shards(shards, 2, settings.megabytes * 10**6 // size, settings.length, _VOCABULARY)
    names = [name for name in os.listdir(shards) if name.endswith(".npz")]
    sizes = [os.path.getsize(os.path.join(shards, name)) / 1e6 for name in names]
    flags = _flags(settings, shards, run, settings.steps, settings.steps // 20)
    require_success(start_training(_WORKERS, flags), flags)
    lines = metric_lines(run)[1:]
    share = statistics.mean(line["data_share"] for line in lines)
    speed = statistics.median(line["tokens_per_second"] for line in lines)
    print(
        f"{len(sizes)} shards of {sizes[0]:,.0f} MB, {_WORKERS} workers, {settings.student_model}: "
        f"{share:.2%} of the time waiting for data, {speed:,.0f} tokens/s",
        flush=True,
    )
    return share


def _passes(settings: StarvationBenchmarkSettings, folder: str) -> tuple[list[float], int]:
    shards, run = os.path.join(folder, "small"), os.path.join(folder, "small-run")
    write_shards(shards, 1, settings.sequences, settings.length, _VOCABULARY)
    batches = -(-settings.sequences // settings.batch_size)
    steps = -(-settings.passes * batches // _WORKERS)
    flags = _flags(settings, shards, run, steps, max(1, steps // 50))
    process = start_training(_WORKERS, flags)
    seen: set[Process] = set()
    samples: list[tuple[float, float]] = []
    while process.poll() is None:
        done = [line["step"] for line in metric_lines(run)]
        family = _family(process.pid)
        seen |= family
        # While the last checkpoint is written, memory holds copies of the arrays.
        if done and done[-1] < steps:
            samples.append((done[-1] / steps, _private_memory(family)))
        time.sleep(0.2)
    require_success(process, flags)
    memory = [peak(samples, low, high) for low, high in ((0.1, 0.3), (0.8, 1.0))]
    return memory, len(_still_there(seen))


def peak(samples: Sequence[tuple[float, float]], low: float, high: float) -> float:
    """Return the largest memory between two parts of a run, of samples (part, memory)."""
    found = [memory for part, memory in samples if low <= part < high]
    if not found:
        raise UserError("--passes: the run was over before its memory could be measured; give more")
    return max(found)


def _flags(
    settings: StarvationBenchmarkSettings, shards: str, run: str, steps: int, log_interval: int
) -> JSONObject:
    return {
        "data": shards,
        "student_model": settings.student_model,
        "batch_size": settings.batch_size,
        "num_steps": steps,
        "log_interval": log_interval,
        "ckpt_dir": run,
    }


class Process(NamedTuple):
    """A process, distinguished by its start time from a later one with the same id."""

    pid: int
    start: int  # clock ticks after that of the machine


def _family(ancestor: int) -> set[Process]:
    """Return a process and all its descendants."""
    processes, parents = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8") as file:
            # The second field is the program's name in parentheses; it may hold any character.
            fields = file.read().rpartition(")")[2].split()
            if fields[0] == "Z":  # a zombie: ended, but its parent has not read the status
                continue
            parents[int(name)] = int(fields[1])
            processes[int(name)] = Process(int(name), int(fields[19]))
    pids = {ancestor}
    while new := {pid for pid, parent in parents.items() if parent in pids} - pids:
        pids |= new
    return {processes[pid] for pid in pids if pid in processes}


def _still_there(processes: set[Process], patience: float = 5.0) -> set[Process]:
    """Return the processes that have not ended after `patience` seconds."""
    end = time.monotonic() + patience
    while processes and time.monotonic() < end:
        processes = {process for process in processes if process in _family(process.pid)}
        time.sleep(0.1)
    return processes


def _private_memory(processes: set[Process]) -> float:
    """Return the private memory of processes in MB, without mapped files."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
            total += int(fields.get("RssAnon", "0 kB").split()[0])
    return total / 1e3
