#!/usr/bin/env python3
"""Print the tables of the pretraining of Bort's own shape.

    python scripts/experiments/true_bort.py FOLDER

FOLDER is that of scripts/experiments/true_bort.sh: model is a pretraining run, tasks/START/SEED
are fine-tuning runs. The hours that the published pretraining would take here follow from the
median throughput of the run. How many tokens it read is not published; the two guesses are the
number in the name of the released checkpoint and the limit of its recipe, both with 1,024 tokens
on each of 8 workers an update.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's code

from bort.config import OneLineParser
from bort.errors import entry_point
from bort.tables import markdown_table
from scripts.experiments.distillation import tasks_table
from scripts.plot_metrics import Run, read_run

TOKENS_OF_UPDATE = 8 * 1024
PUBLISHED_UPDATES = (44_100, 2_000_000)


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Print the tables of a folder."""
    parser = OneLineParser(description=str(__doc__))
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    folder = parser.parse_args(argv).folder
    run = read_run(str(folder / "model"))
    print(curve_table(run))
    speeds = run.curve("train", "tokens_per_second").values
    if speeds:  # none yet in a run that has just begun
        print(hours_table(statistics.median(speeds)))
    print(tasks_table(folder / "tasks"), end="")


def curve_table(run: Run) -> str:
    """Return the held-out metrics by step."""
    curves = [run.curve("eval", metric) for metric in ("mlm_loss", "accuracy", "kl")]
    rows = [
        [f"{step:,}", f"{loss:.3f}", f"{100 * accuracy:.1f}", f"{kl:.3f}"]
        for step, loss, accuracy, kl in zip(curves[0].steps, *(curve.values for curve in curves))
    ]
    return markdown_table(["step", "held-out masked-LM loss", "accuracy, %", "T² KL"], rows)


def hours_table(tokens_per_second: float) -> str:
    """Return how long the published pretraining would take at a throughput."""
    rows = []
    for updates in PUBLISHED_UPDATES:
        tokens = updates * TOKENS_OF_UPDATE
        hours = tokens / tokens_per_second / 3600
        rows.append([f"{updates:,}", f"{tokens / 1e6:,.0f} million", f"{hours:,.0f}"])
    header = ["updates", "tokens", f"hours at {tokens_per_second:,.0f} tokens/s"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
