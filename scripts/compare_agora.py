#!/usr/bin/env python3
r"""Compare plain fine-tuning, the best of a grid and Agora on the test sets of several draws.

    python scripts/compare_agora.py SST-2 --plain plain/draw-* --agora agora/draw-* \
        --random random/draw-*

Each folder is the --output_dir of one run: of finetune_classifier.py, of run_agora.py, and of
run_agora.py with --images_from random, in the same order of draws. Prints a Markdown table: mean
and standard deviation over the draws of the task's score on its test set, which nothing is
selected on; the draws in which Agora beats the best of its grid; seconds of a run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.agora.comparison import Column, columns_of, comparison_table
from bort.config import OneLineParser
from bort.errors import entry_point
from data.tasks import get_task

FLAGS = {
    "plain": "runs of finetune_classifier.py (required)",
    "agora": "runs of run_agora.py (required)",
    "random": "the same with --images_from random",
}


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> list[Column]:
    """Print the table; returns its columns."""
    parser = OneLineParser(description=str(__doc__))
    parser.add_argument("task", help="name of the task")
    for name, text in FLAGS.items():
        required = name != "random"
        parser.add_argument(
            f"--{name}", nargs="+", required=required, default=[], metavar="RUN", help=text
        )
    flags = parser.parse_args(argv)
    columns = columns_of(get_task(flags.task), flags.plain, flags.agora, flags.random)
    print(comparison_table(flags.task, columns), end="")
    return columns


if __name__ == "__main__":
    main()
