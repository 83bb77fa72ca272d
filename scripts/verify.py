#!/usr/bin/env python3
r"""Say what a folder holds, and whether each thing in it is complete and undamaged.

    python scripts/verify.py runs/bort
    python scripts/verify.py .

Knows shards, teacher caches, checkpoints, runs of pretraining and fine-tuning, saved models with
their exports, ONNX files, sweeps, runs of Agora and OSE, encoded caches, files and archives for
leaderboards, and Hugging Face folders. SHA-256 sums are compared where the format has them. Exit
status 1 when something is damaged or not finished. Nothing is changed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import OneLineParser
from bort.errors import entry_point


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Print the table; returns the number of things that are damaged or not finished."""
    parser = OneLineParser(description=str(__doc__))
    parser.add_argument("folder", metavar="FOLDER", help="a folder, or a .params, .onnx or .zip")
    folder = parser.parse_args(argv).folder
    from scripts.verification.report import COMPLETE, table, verify

    rows = verify(folder)
    print(table(rows))
    return sum(row.state != COMPLETE for row in rows)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
