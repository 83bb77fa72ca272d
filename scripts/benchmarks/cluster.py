"""Text to shards by --cluster on one machine: speed, and what the command and the scheduler use.

A scheduler and workers of one job each are started here. The command's and the scheduler's share of
the work decides how many workers they can keep busy.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional, Sequence

import psutil

from bort.cluster import ClusterSettings
from bort.config import counts_of, option, parse, required
from bort.errors import UserError
from bort.jobs import peak_megabytes
from bort.mxnet_setup import usable_cores
from bort.tables import markdown_table

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 180.0  # until a scheduler and its workers are there


@dataclass(frozen=True)
class Settings:
    """The text, and the cluster."""

    input_file: str = required("text, which is repeated in files of its size")
    megabytes: str = option("50,500", "sizes of the text")
    shard_megabytes: int = option(25, "text of a shard", minimum=1)
    dataset_name: Optional[str] = option(None, "vocabulary (default: the sample's)")
    workers: int = option(usable_cores(), "number of workers, each of one job", minimum=1)


class Usage(NamedTuple):
    """What a process has used."""

    seconds: float  # of the CPU
    megabytes: float  # at its peak


def main(argv: Optional[Sequence[str]] = None) -> list[list[str]]:
    """Print a table with one row per size of the text; return its rows."""
    (settings,) = parse(str(__doc__), argv, Settings)
    ClusterSettings("tcp://here").check()
    rows = []
    for megabytes in counts_of("--megabytes", settings.megabytes):
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            size = _write_text(folder, settings.input_file, megabytes)
            shards = max(settings.workers, -(-megabytes // settings.shard_megabytes))
            scheduler = stack.enter_context(_cluster(folder, settings.workers))
            flags = ["--num_outputs", str(shards)]
            if settings.dataset_name:
                flags += ["--dataset_name", settings.dataset_name]
            usage = _measured(folder, flags, size, shards, scheduler)
            rows.append([f"{size / 1e6:.0f}", str(shards), str(settings.workers), *usage])
    header = ["MB", "shards", "workers", "s", "MB/s", "CPU s: command", "of it per shard"]
    header += ["CPU s: scheduler", "peak MB: command", "peak MB: scheduler"]
    print(markdown_table(header, rows), end="")
    return rows


def _write_text(folder: str, path: str, megabytes: int) -> int:
    """Write the text to files of its size, the last one shorter; return their bytes."""
    text, left = Path(path).read_bytes(), megabytes * 10**6
    if not text:
        raise UserError(f"--input_file {path}: is empty")
    os.mkdir(os.path.join(folder, "text"))
    for number in range(-(-left // len(text))):
        # Without the part of a character that is cut in two.
        piece = text[: left - number * len(text)].decode(errors="ignore").encode()
        Path(folder, "text", f"{number:04d}.txt").write_bytes(piece)
    return left


@contextmanager
def _cluster(folder: str, workers: int) -> Iterator[psutil.Process]:
    """Start a scheduler and workers, give the scheduler's process, and end them."""
    file, log = os.path.join(folder, "scheduler.json"), os.path.join(folder, "log")
    one = ("--nthreads", "1", "--local-directory", folder)
    commands = [
        ["scheduler", "--host", "localhost", "--port", "0"],
        *[["worker", *one] for _ in range(workers)],
    ]
    started: list[psutil.Popen] = []
    try:
        with open(log, "w", encoding="utf-8") as handle:
            for name, *flags in commands:
                words = [sys.executable, "-m", f"distributed.cli.dask_{name}", "--no-dashboard"]
                words += ["--scheduler-file", file, *flags]
                environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                started.append(
                    psutil.Popen(words, stdout=handle, stderr=subprocess.STDOUT, env=environment)
                )
        _await_workers(log, workers, started)
        yield started[0]
    finally:
        for process in reversed(started):
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in started:
            process.wait()


def _await_workers(log: str, workers: int, started: Sequence[psutil.Popen]) -> None:
    """Wait for the workers; raises `UserError` when one, or the scheduler, does not start."""
    end = time.monotonic() + SECONDS
    while (text := Path(log).read_text(encoding="utf-8")).count("Registered to:") < workers:
        ended = any(process.poll() is not None for process in started)
        if ended or time.monotonic() > end:  # the log is about to be removed
            raise UserError(f"scheduler and workers did not start: {' '.join(text[-300:].split())}")
        time.sleep(0.1)


def _measured(
    folder: str, flags: Sequence[str], size: int, shards: int, scheduler: Any
) -> list[str]:
    """Run the command on the text of a folder; return the cells after the first three."""
    before, start = _usage(scheduler), time.perf_counter()
    words = [str(ROOT / "create_pretraining_data.py"), "--input_file", f"{folder}/text"]
    words += ["--output_dir", f"{folder}/shards", "--cluster", f"{folder}/scheduler.json", *flags]
    command = psutil.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    used = Usage(0.0, 0.0)
    while command.poll() is None:
        with suppress(psutil.Error):
            now = _usage(command)
            used = Usage(now.seconds, max(used.megabytes, now.megabytes))  # 0 when it has ended
        time.sleep(0.05)
    if command.returncode:
        raise UserError("create_pretraining_data.py failed")
    seconds, after = time.perf_counter() - start, _usage(scheduler)
    return [
        *(f"{seconds:.1f}", f"{size / seconds / 1e6:.1f}"),
        *(f"{used.seconds:.2f}", f"{used.seconds / shards:.3f}"),
        *(f"{after.seconds - before.seconds:.2f}", f"{used.megabytes:.0f}"),
        f"{after.megabytes:.0f}",
    ]


def _usage(process: Any) -> Usage:
    times = process.cpu_times()
    return Usage(times.user + times.system, peak_megabytes(process.pid))
