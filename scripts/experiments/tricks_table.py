#!/usr/bin/env python3
"""Print the table of scripts/experiments/tricks.sh: dev scores of each runtime.

    python scripts/experiments/tricks_table.py RUNS
    python scripts/experiments/tricks_table.py --best RUNS/<network>/<task>-sweep

RUNS contains <network>/<task>-sweep/<run>/<task>/int8/best.json, as scripts/quantize.py leaves it.
A row is of the best run that has kept its weights, which --best prints: every grid of a sweep keeps
those of one run. Runs with seed 0 are left out: they chose the rates.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's code

from bort.config import OneLineParser
from bort.errors import UserError, entry_point
from bort.files import read_json_as
from bort.finetuning.sweep import RunMetrics
from bort.tables import markdown_table

HEADER = ("network", "task", "runtime", "score in points", "lost", "cosine of the logits")


@dataclass(frozen=True)
class Check:
    """The development set in one runtime."""

    runtime: str
    score: float
    cosine: float


@dataclass(frozen=True)
class Record:
    """What the table reads of the record of int8 models; the first check is MXNet in float32."""

    checks: list[Check]


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> str:
    """Print the table, or the best weights of a sweep, and return them."""
    parser = OneLineParser(description=str(__doc__))
    parser.add_argument("--best", action="store_true", help="print the weights of the best run")
    parser.add_argument("runs", type=Path, help="folder with a folder per network, or a sweep")
    parsed = parser.parse_args(argv)
    folder = parsed.runs
    if parsed.best:
        best = best_weights(folder)
        if best is None:
            raise UserError(f"{folder}: has no finished run with weights")
        print(best)
        return str(best)
    weights = map(best_weights, sorted(folder.glob("*/*-sweep")))
    records = [best.with_name("int8") / "best.json" for best in weights if best]
    paths = [path for path in records if path.exists()]
    if not paths:
        raise UserError(f"{folder}: has no int8 models")
    table = markdown_table(HEADER, [row for path in paths for row in _rows(path)])
    print(table, end="")
    return table


def best_weights(sweep: Path) -> Optional[Path]:
    """Return the weights of the best finished run of a sweep that has any, not of seed 0."""
    task = sweep.name.removesuffix("-sweep")
    scores = {
        path.with_name("best.params"): read_json_as(str(path), RunMetrics).best.score
        for path in sorted(sweep.glob(f"*/{task}/metrics.json"))
        if path.with_name("best.params").exists() and not re.search(r"\bseed=0\b", path.parts[-3])
    }
    return max(scores, key=scores.__getitem__, default=None)


def _rows(path: Path) -> list[list[str]]:
    checks = read_json_as(str(path), Record).checks
    network, task = path.parts[-6], path.parts[-3]
    return [
        [
            *(network, task, check.runtime, f"{check.score:.2f}"),
            *(f"{checks[0].score - check.score:.2f}", f"{check.cosine:.5f}"),
        ]
        for check in checks
    ]


if __name__ == "__main__":
    main()
