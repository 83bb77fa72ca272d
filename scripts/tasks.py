"""List every task: kind, metrics, rows, files; with --check read all splits of some tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import OneLineParser
from bort.errors import UserError, entry_point
from bort.tables import markdown_table
from data.download import expand
from data.survey import HEADER, check_task, task_row
from data.tasks import get_task, task_names


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> list[list[str]]:
    """Print the table, or what --check found; returns the table's rows."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "--check",
        nargs="+",
        metavar="TASK",
        help="read every split of these tasks: names, or glue, superglue, race, all",
    )
    parser.add_argument(
        "--data_dir", help="folder of the data (default: $MXNET_HOME/datasets or ~/.mxnet/datasets)"
    )
    arguments = parser.parse_args(argv)
    names = expand(arguments.check) if arguments.check else task_names()
    rows = [task_row(get_task(name), arguments.data_dir) for name in names]
    if not arguments.check:
        print(markdown_table(HEADER, rows), end="")
        return rows
    faults = 0
    for name in names:
        lines, count = check_task(get_task(name), arguments.data_dir)
        print("\n".join(lines))
        faults += count
    if faults:
        raise UserError(f"{faults} splits are missing or broken")
    return rows


if __name__ == "__main__":
    main()
