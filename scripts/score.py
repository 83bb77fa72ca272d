"""Average the scores of fine-tuning runs as GLUE and SuperGLUE do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import OneLineParser
from bort.errors import entry_point
from bort.finetuning.scoreboard import SuiteScore, as_table, suite_scores
from data.tasks import SUITES


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> dict[str, SuiteScore]:
    """Print one table per suite that has a run, and return them by suite."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with metrics.json files")
    tables = suite_scores(SUITES, parser.parse_args(argv).runs)
    print("\n\n".join(as_table(suite, table) for suite, table in tables.items()))
    return tables


if __name__ == "__main__":
    main()
