#!/usr/bin/env python3
r"""Give damaged and hostile files to every reader, and count the outcomes.

    python scripts/fuzz.py --cases 2000 --seed 1
    python scripts/fuzz.py --only shards,onnx --cases 500
    python scripts/fuzz.py --only "task CoLA" --seed 1 --case 17

A clean line is an error of one line that names the file; handled means a value that a good file
could give. Everything else is a fault of the reader: the exit status is then 1.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import option, parse
from bort.errors import entry_point


@dataclass(frozen=True)
class FuzzSettings:
    """What is tried."""

    cases: int = option(2000, "damaged files, over all formats", minimum=1)
    seed: int = option(0, "of every damage", minimum=0)
    only: str = option("", "formats whose names hold one of these words")
    jobs: int = option(os.cpu_count() or 1, "processes at a time", minimum=1)
    case: Optional[int] = option(None, "run one case of --only with its traceback", minimum=0)


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Print the table; returns the number of problems."""
    (settings,) = parse(str(__doc__), argv, FuzzSettings)
    from tests.fuzz import formats

    formats.prepare_imports()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        if settings.case is not None:
            return one_case(settings, Path(folder))
        return many_cases(settings, Path(folder))


def many_cases(settings: FuzzSettings, folder: Path) -> int:
    """Run all cases and print the table of outcomes."""
    from tests.fuzz import formats, harness

    start = time.perf_counter()
    chosen = formats.named(settings.only)
    samples = harness.make_samples(chosen, folder / "samples", settings.jobs)
    made = time.perf_counter()
    work = folder / "work"
    work.mkdir()
    tallies = harness.run(chosen, samples, settings.cases, settings.seed, settings.jobs, work)
    print(harness.table(tallies))
    found = harness.problems(tallies)
    print("\n".join(["", *found]) if found else "no problems")
    seconds = time.perf_counter() - made
    print(f"seed {settings.seed}: {seconds:.1f} s, and {made - start:.1f} s for the samples")
    return sum(len(tally.problems) for tally in tallies.values())


def one_case(settings: FuzzSettings, folder: Path) -> int:
    """Run one case again here, and show the damage and the traceback."""
    from tests.fuzz import formats, harness

    (form, *_) = formats.named(settings.only)
    samples = harness.make_samples([form], folder / "samples")
    bench = samples.bench(form, settings.seed, folder / "work")
    case = bench.run(settings.case, keep=True)
    print(case)
    try:
        print(str(form.read(folder / "work"))[:2000])
    except Exception:
        traceback.print_exc()
    return int(case.outcome not in harness.GOOD)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
