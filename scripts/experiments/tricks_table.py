#!/usr/bin/env python3
"""Print the table of scripts/experiments/tricks.sh: dev scores of each runtime.

    python scripts/experiments/tricks_table.py RUNS

RUNS contains <network>/<task>-sweep/<run>/<task>/int8/best.json, as scripts/quantize.py leaves it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's code

from bort.config import OneLineParser
from bort.errors import UserError, entry_point
from bort.files import read_json_as
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
    """Print the table, and return it."""
    parser = OneLineParser(description=str(__doc__))
    parser.add_argument("runs", type=Path, help="folder with a folder per network")
    folder = parser.parse_args(argv).runs
    paths = sorted(folder.glob("*/*-sweep/*/*/int8/best.json"))
    if not paths:
        raise UserError(f"{folder}: has no int8 models")
    table = markdown_table(HEADER, [row for path in paths for row in _rows(path)])
    print(table, end="")
    return table


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
