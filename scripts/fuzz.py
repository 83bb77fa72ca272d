#!/usr/bin/env python3
r"""Give damaged and hostile files to every reader, and count the outcomes.

    python scripts/fuzz.py --cases 2000 --seed 1
    python scripts/fuzz.py --only shards,onnx --cases 500
    python scripts/fuzz.py --only "task CoLA" --seed 1 --case 17
    python scripts/fuzz.py --flips --cases 4000
    python scripts/fuzz.py --faults --only predict.py,sweep.py

A clean error is one line that names the file; handled means a value that a valid file could give.
Everything else is a fault of the reader: the exit status is then 1. --flips flips one bit of a file
with a checksum and counts by file how often that was noticed. --faults runs every program while it
is killed, the disk is full, streams are closed, and so on.
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
    seed: int = option(0, "random seed of the damage", minimum=0)
    only: str = option("", "formats, with --faults programs, whose names hold one of these words")
    flips: bool = option(False, "flip single bits, in formats with checksums")
    faults: bool = option(False, "run every program under faults of the system")
    repeats: int = option(2, "moments at which --faults kills each program", minimum=1)
    jobs: int = option(os.cpu_count() or 1, "processes at a time", minimum=1)
    case: Optional[int] = option(None, "run one case of --only with its traceback", minimum=0)


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Print the table; returns the number of problems."""
    (settings,) = parse(str(__doc__), argv, FuzzSettings)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        if settings.faults:
            return all_faults(settings, Path(folder))
        if settings.case is not None:
            return one_case(settings, Path(folder))
        return many_cases(settings, Path(folder))


def many_cases(settings: FuzzSettings, folder: Path) -> int:
    """Run all cases and print the table of outcomes."""
    from tests.fuzz import formats, harness

    formats.prepare_imports()
    start = time.perf_counter()
    chosen = formats.named(settings.only, has_sums=settings.flips)
    samples = harness.make_samples(chosen, folder / "samples", settings.jobs, settings.flips)
    made = time.perf_counter()
    work = folder / "work"
    work.mkdir()
    tallies = harness.run(chosen, samples, settings.cases, settings.seed, settings.jobs, work)
    print((harness.flip_table if settings.flips else harness.table)(tallies))
    found = harness.problems(tallies)
    print("\n".join(["", *found]) if found else "no problems")
    seconds = time.perf_counter() - made
    print(f"seed {settings.seed}: {seconds:.1f} s, and {made - start:.1f} s for the samples")
    return sum(len(tally.problems) for tally in tallies.values())


def all_faults(settings: FuzzSettings, folder: Path) -> int:
    """Run every program under every fault and print the table of outcomes."""
    from tests.fuzz import faults

    start = time.perf_counter()
    chosen = faults.chosen(settings.only)
    outcomes = faults.run(
        chosen, list(faults.FAULTS), settings.repeats, settings.seed, settings.jobs, folder
    )
    print(faults.table(outcomes))
    skipped = sorted({one.problem for one in outcomes if one.problem.startswith(faults.SKIPPED)})
    found = faults.problems(outcomes)
    lines = [f"{one.program}, {one.fault}: {one.problem}" for one in found]
    print("\n".join(["", *skipped, *lines]) if skipped or found else "no problems")
    print(f"seed {settings.seed}: {time.perf_counter() - start:.0f} s")
    return len(found)


def one_case(settings: FuzzSettings, folder: Path) -> int:
    """Run one case again here, and show the damage and the traceback."""
    from tests.fuzz import formats, harness

    form = formats.one_named(settings.only, has_sums=settings.flips)
    formats.prepare_imports()
    samples = harness.make_samples([form], folder / "samples", flips=settings.flips)
    runner = samples.runner(form, settings.seed, folder / "work")
    case = runner.run(settings.case, keep=True)
    print(case)
    try:
        print(str(form.read(folder / "work"))[:2000])
    except Exception:
        traceback.print_exc()
    return int(case.outcome not in harness.PASSED)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
