"""Peak memory of create_pretraining_data.py for texts of growing size, one process.

python scripts/benchmark.py memory --input_file FILE [--megabytes 5,50,500]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Optional, Sequence

from benchmarks.data import write_text
from bort.config import counts_of, option, parse, required
from bort.errors import UserError
from bort.tokenization import RELEASED_DATASET
from data.corpus import open_sources

_PROGRAM = os.path.join(
    os.path.dirname(os.path.abspath(__file__)), "..", "..", "create_pretraining_data.py"
)


@dataclass(frozen=True)
class MemoryBenchmarkSettings:
    """How peak memory is measured."""

    input_file: str = required(
        "text, as for create_pretraining_data.py, repeated or cut to each size"
    )
    megabytes: str = option("5,50,500", "sizes of text, separated by commas")
    dataset_name: str = option(RELEASED_DATASET, "vocabulary")
    num_outputs: int = option(1, "number of shards", minimum=1)


def main(argv: Optional[Sequence[str]] = None) -> dict[int, float]:
    """Measure, print, return {MB of text: peak resident memory in MB}."""
    (settings,) = parse(str(__doc__), argv, MemoryBenchmarkSettings)
    peaks = {}
    sizes = counts_of("--megabytes", settings.megabytes)
    with open_sources(settings.input_file) as sources:
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                text = os.path.join(folder, "text.txt")
                write_text(sources, size * 10**6, text)
                peaks[size] = _peak_of_run(text, os.path.join(folder, "shards"), settings)
            print(f"{size:8.0f} MB of text: peak resident memory {peaks[size]:6.0f} MB", flush=True)
    return peaks


def _peak_of_run(text: str, shards: str, settings: MemoryBenchmarkSettings) -> float:
    flags = {
        "input_file": text,
        "output_dir": shards,
        "dataset_name": settings.dataset_name,
        "num_outputs": settings.num_outputs,
        "num_workers": 1,
    }
    command = [sys.executable, _PROGRAM]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    # Not wait(): only this tells the memory of this one process.
    _, status, usage = os.wait4(process.pid, 0)
    if status:  # it has said why
        raise UserError("create_pretraining_data.py failed")
    return usage.ru_maxrss * 1024 / 1e6
