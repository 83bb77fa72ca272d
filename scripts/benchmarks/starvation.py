"""Does training ever wait for its data, does memory grow, and is a process left behind.

    python scripts/benchmark.py starvation [--megabytes 500] [--passes 50]

First two workers train a small student on two shards of so many megabytes: the share of the time
they wait for data. Then they go over a few sequences so many times: the memory that is theirs
alone, after a fifth of the passes and at the end, and the processes that are there afterwards.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Sequence

from benchmarks.workers import metric_lines, require_success, start_training, write_shards
from bort.config import option, parse

_WORKERS = 2
_VOCABULARY = 50265
# Of a sequence in a shard: tokens, masked positions, true tokens, and two offsets.
_BYTES_OF_OFFSETS = 16


@dataclass(frozen=True)
class StarvationBenchmarkSettings:
    """What is trained, and on how much."""

    student_model: str = option("bort_2_4_512_256", "shape; the smaller, the more data it needs")
    megabytes: int = option(500, "size of each of two shards", minimum=1)
    length: int = option(128, "tokens per sequence", minimum=8, maximum=512)
    batch_size: int = option(4, "sequences per worker and update", minimum=1)
    steps: int = option(120, "updates on the large shards", minimum=20)
    passes: int = option(50, "passes over the few sequences", minimum=5)
    sequences: int = option(48, "number of the few sequences", minimum=8)


class Outcome(NamedTuple):
    """What was found."""

    waiting: float  # share of the time
    memory: list[float]  # MB of all workers, after a fifth of the passes and at the end
    left_behind: int  # processes


def main(argv: Optional[Sequence[str]] = None) -> Outcome:
    """Measure, print, return the numbers."""
    (settings,) = parse(str(__doc__), argv, StarvationBenchmarkSettings)
    with tempfile.TemporaryDirectory() as folder:
        waiting = _waiting(settings, folder)
        memory, left_behind = _passes(settings, folder)
    print(
        f"{settings.passes} passes: memory of {_WORKERS} workers, after a fifth of them and at the"
    )
    print(f"end: {memory[0]:,.0f} and {memory[1]:,.0f} MB; processes left behind: {left_behind}")
    return Outcome(waiting, memory, left_behind)


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
        # While the last checkpoint is written, there are copies of the arrays.
        if done and done[-1] < steps:
            samples.append((done[-1] / steps, _private_memory(family)))
        time.sleep(0.2)
    require_success(process, flags)
    first, last = (
        max(memory for part, memory in samples if low <= part < high)
        for low, high in ((0.1, 0.3), (0.8, 1.0))
    )
    return [first, last], len(_still_there(seen))


def _flags(
    settings: StarvationBenchmarkSettings, shards: str, run: str, steps: int, log_interval: int
) -> dict[str, Any]:
    return {
        "data": shards,
        "student_model": settings.student_model,
        "batch_size": settings.batch_size,
        "num_steps": steps,
        "log_interval": log_interval,
        "ckpt_dir": run,
    }


class Process(NamedTuple):
    """A process, told from a later one of the same number by the moment of its start."""

    number: int
    start: int  # clock ticks after the machine's


def _family(ancestor: int) -> set[Process]:
    """Return a process and all that it and its children started."""
    processes, parents = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8") as file:
            # The second field is the program's name in parentheses, with anything in it.
            fields = file.read().rpartition(")")[2].split()
            if fields[0] == "Z":  # ended, not yet asked for its status
                continue
            parents[int(name)] = int(fields[1])
            processes[int(name)] = Process(int(name), int(fields[19]))
    numbers = {ancestor}
    while new := {one for one, parent in parents.items() if parent in numbers} - numbers:
        numbers |= new
    return {processes[number] for number in numbers if number in processes}


def _still_there(processes: set[Process], patience: float = 5.0) -> set[Process]:
    """Return those that have not ended after so many seconds, the time that an end may take."""
    end = time.monotonic() + patience
    while processes and time.monotonic() < end:
        processes = {one for one in processes if one in _family(one.number)}
        time.sleep(0.1)
    return processes


def _private_memory(processes: set[Process]) -> float:
    """Return the MB that processes have for themselves, mapped files not counted."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError), open(f"/proc/{process.number}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
            total += int(fields.get("RssAnon", "0 kB").split()[0])
    return total / 1e3
