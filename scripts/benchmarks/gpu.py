#!/usr/bin/env python3
"""Measure steps of pretraining on GPUs: tokens/s, and the share of the peak. Not run on a GPU yet.

python scripts/benchmark.py gpu --gpus 0 --peak_tflops 60
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import NamedTuple, Optional, Sequence

from benchmarks._peers import whole_batches
from benchmarks.workers import write_shards
from bort.config import option, parse
from bort.errors import UserError

WARMUP = 5  # steps before the clock starts: memory is found and kernels are chosen
MASKED = 0.15
VOCABULARY = 50_265
SEQUENCES = 512


@dataclass(frozen=True)
class GpuBenchmarkSettings:
    """Benchmark."""

    gpus: str = option("0", "GPU numbers such as 0,1")
    peak_tflops: Optional[float] = option(
        None, "peak of one GPU in float32, for the share of it", minimum=1e-3
    )
    student_model: str = option("bort_4_8_768_1024", "shape of the student")
    batch_size: int = option(32, "sequences per micro-batch and GPU", minimum=1)
    length: int = option(512, "tokens of a sequence", minimum=8, maximum=512)
    seconds: float = option(40.0, "time of each measurement", minimum=1.0)


class Speed(NamedTuple):
    """What one precision reaches."""

    dtype: str
    tokens_per_second: float
    tflops: float  # of all GPUs together


def main(argv: Optional[Sequence[str]] = None) -> list[Speed]:
    """Run the benchmark; returns a row for float32 and one for float16."""
    (settings,) = parse(str(__doc__), argv, GpuBenchmarkSettings)
    with tempfile.TemporaryDirectory() as folder:
        sequences = whole_batches(SEQUENCES, settings.batch_size)
        write_shards(f"{folder}/shards", 1, sequences, settings.length, VOCABULARY)
        speeds = [measure(settings, dtype, folder) for dtype in ("float32", "float16")]
    print(table(speeds, settings))
    return speeds


def measure(settings: GpuBenchmarkSettings, dtype: str, folder: str) -> Speed:
    """Train for some time in a precision."""
    from mxnet import nd

    from bort.communicator import SingleProcess
    from bort.devices import devices_of
    from bort.pretraining.config import settings_of
    from bort.pretraining.run import pretraining_loop
    from bort.reporter import NullReporter

    run = settings_of(
        data=f"{folder}/shards",
        student_model=settings.student_model,
        batch_size=settings.batch_size,
        num_steps=10**6,
        log_interval=10**6,
        dtype=dtype,
        gpus=settings.gpus,
        on_nonfinite="skip",
        ckpt_dir=f"{folder}/{dtype}",
    )
    alone = SingleProcess()
    loop = pretraining_loop(run, alone, devices_of(run.run.gpus, 1, alone), NullReporter())
    loop.setup()
    batches = loop.batches()
    for _ in range(WARMUP):
        loop.train_step(batches)
    nd.waitall()
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < settings.seconds:
        loop.train_step(batches)
        steps += 1
    nd.waitall()
    seconds = time.perf_counter() - start
    batches.close()
    if not steps:
        raise UserError("--seconds: no step ended in this time; give more")
    tokens = steps * loop.micro_batches * settings.batch_size * settings.length
    flops = flops_per_token(settings.student_model, settings.length)
    return Speed(dtype, tokens / seconds, flops * tokens / seconds / 1e12)


def flops_per_token(model: str, length: int) -> float:
    """Return the floating point operations of a training step per token, forward and backward.

    Two for each multiplication and addition of a matrix product, three passes. The projection onto
    the vocabulary is computed for the masked tokens alone.
    """
    from bort.shapes import shape_of

    shape = shape_of(model)
    layer = 4 * shape.hidden**2 + 2 * shape.hidden * shape.intermediate + 2 * length * shape.hidden
    decoder = MASKED * (shape.hidden**2 + shape.hidden * VOCABULARY)
    return 3 * 2 * (shape.layers * layer + decoder)


def table(speeds: Sequence[Speed], settings: GpuBenchmarkSettings) -> str:
    """Format the rows; that of float32 with the share of the peak where that is known."""
    count = len(settings.gpus.split(","))
    lines = [f"{settings.student_model}, {count} GPU(s), batches of {settings.batch_size} x "
             f"{settings.length} tokens"]  # fmt: skip
    for dtype, tokens, tflops in speeds:
        share = ""
        if settings.peak_tflops and dtype == "float32":
            share = f"  {tflops / (count * settings.peak_tflops):6.1%} of the peak"
        lines.append(f"{dtype:<8} {tokens:>12,.0f} tokens/s  {tflops:8.2f} TFLOP/s{share}")
    return "\n".join(lines)
