"""One process with all threads, or a process for each: which trains Bort faster on this machine.

    python scripts/benchmark.py workers [--steps 9] [--rounds 2]

Both make the same updates: as many sequences each, on all cores that may be used. The processes
run under horovodrun with a core each. They take turns; the table has medians of the metric lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any, Optional, Sequence

import numpy as np

from benchmarks._peers import whole_batches
from bort.config import option, parse
from bort.errors import UserError
from bort.mxnet_setup import usable_cores
from bort.types import JSONObject

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SEQUENCES = 8
_MASKED = 0.15
_SEQUENCES_AT_ONCE = 10_000


@dataclass(frozen=True)
class WorkersBenchmarkSettings:
    """What is trained, and how long."""

    student_model: str = option("bort_4_8_768_1024", "shape")
    batch_size: Optional[int] = option(
        None, "sequences per update (default: 8, or as many more as the cores divide)", minimum=1
    )
    length: int = option(128, "tokens per sequence", minimum=8, maximum=512)
    vocab_size: int = option(50265, "tokens of the vocabulary", minimum=100)
    steps: int = option(9, "updates of each run; the first third is not counted", minimum=3)
    rounds: int = option(2, "runs of each variant", minimum=1)


def main(argv: Optional[Sequence[str]] = None) -> dict[int, float]:
    """Measure, print, return {processes: median tokens per second}."""
    (settings,) = parse(str(__doc__), argv, WorkersBenchmarkSettings)
    processes = (1, usable_cores())
    batch_size = settings.batch_size or whole_batches(SEQUENCES, processes[1])
    if batch_size % processes[1]:
        raise UserError(
            f"--batch_size {batch_size}: not divisible by the {processes[1]} cores; give a multiple"
        )
    speeds: dict[int, list[float]] = {count: [] for count in processes}
    with tempfile.TemporaryDirectory() as folder:
        shards = os.path.join(folder, "shards")
        write_shards(shards, 1, 1024, settings.length, settings.vocab_size)
        for number, count in enumerate(processes * settings.rounds):
            run = os.path.join(folder, f"run-{number}")
            flags = {
                "data": shards,
                "student_model": settings.student_model,
                "batch_size": batch_size // count,
                "num_steps": settings.steps,
                "log_interval": settings.steps // 3,
                "ckpt_dir": run,
            }
            require_success(start_training(count, flags), flags)
            speeds[count] += [line["tokens_per_second"] for line in metric_lines(run)[1:]]
    for count, found in speeds.items():
        threads = processes[1] // count
        print(
            f"{count} process(es) with {threads} thread(s) each: "
            f"{statistics.median(found):,.0f} tokens/s ({min(found):,.0f}-{max(found):,.0f})"
        )
    return {count: statistics.median(found) for count, found in speeds.items()}


def write_shards(folder: str, count: int, sequences: int, length: int, vocab_size: int) -> None:
    """Write `count` shards of random sequences, all full, 15 % of the tokens masked."""
    from data.shards import (
        Manifest,
        ShardWriter,
        TokenizerEntry,
        id_type,
        shard_name,
        write_manifest,
    )

    generator = np.random.default_rng(0)
    os.makedirs(folder)
    masks = round(_MASKED * length)
    entries = []
    for number in range(count):
        path = os.path.join(folder, shard_name(number))
        with ShardWriter(path, id_type(vocab_size)) as writer:
            for start in range(0, sequences, _SEQUENCES_AT_ONCE):
                rows = min(_SEQUENCES_AT_ONCE, sequences - start)
                ids = generator.integers(5, vocab_size, (rows, length))
                order = generator.random((rows, length), dtype=np.float32)
                positions = np.sort(np.argpartition(order, masks, axis=1)[:, :masks], axis=1)
                true = generator.integers(5, vocab_size, (rows, masks))
                lengths, counts = np.full(rows, length), np.full(rows, masks)
                writer.write(ids.ravel(), lengths, positions.ravel(), true.ravel(), counts)
            entries.append(writer.finish(documents=sequences, sentences=sequences, unknown=0))
    tokenizer = TokenizerEntry("random", vocab_size, pad_id=1)
    write_manifest(folder, "manifest.json", Manifest(tokenizer, {}, [], entries))


def start_training(processes: int, flags: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start the pretraining program in so many processes; its output goes into `ckpt_dir`.log."""
    words = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "run_pretraining_distillation.py", *words]
    if processes > 1:
        horovodrun = os.path.join(os.path.dirname(sys.executable), "horovodrun")
        command = [horovodrun, "-np", str(processes), "-H", f"localhost:{processes}"]
        command += [sys.executable, "run_pretraining_distillation_hvd.py", *words]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with open(f"{flags['ckpt_dir']}.log", "wb") as log:
        return subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=log, stderr=log)


def require_success(process: subprocess.Popen[bytes], flags: dict[str, Any]) -> None:
    """Wait for the end of a run; raises `UserError` with the end of its output if it failed."""
    if process.wait():
        with open(f"{flags['ckpt_dir']}.log", encoding="utf-8") as log:
            raise UserError(f"{' '.join(map(str, process.args))} failed: {log.read()[-300:]}")


def metric_lines(run: str) -> list[JSONObject]:
    """Return the training lines of a run's metrics.jsonl, none before there is one."""
    with (
        contextlib.suppress(FileNotFoundError),
        open(os.path.join(run, "metrics.jsonl"), encoding="utf-8") as file,
    ):
        records = [json.loads(line) for line in file if line.endswith("\n")]
        return [record for record in records if record["phase"] == "train"]
    return []
