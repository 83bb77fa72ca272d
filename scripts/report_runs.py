"""Print a table of fine-tuning runs: rows read, scores, time, and checks of their submissions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import OneLineParser
from bort.errors import UserError, entry_point
from bort.finetuning.run_report import RunReport, as_markdown, report


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> list[RunReport]:
    """Print one line per task of every run, and return them."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with metrics.json files")
    reports, problems = report(parser.parse_args(argv).runs)
    print(as_markdown(reports), end="")
    if problems:
        raise UserError("; ".join(problems))
    return reports


if __name__ == "__main__":
    main()
