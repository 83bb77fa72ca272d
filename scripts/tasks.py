"""List every task: kind, metrics, rows, files; with --check read all splits of some tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import OneLineParser
from bort.errors import UserError, entry_point
from bort.tables import aligned_table
from data.download import expand
from data.survey import CHECK_HEADER, HEADER, check_task, task_row
from data.task import expanded
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
    folder = arguments.data_dir
    if folder and not expanded(folder).is_dir():
        raise UserError(f"--data_dir {folder}: is not a folder")
    if not arguments.check:
        rows = [task_row(get_task(name), folder) for name in task_names()]
        print(aligned_table([HEADER, *rows]), end="")
        return rows
    checked = [check_task(get_task(name), folder) for name in expand(arguments.check)]
    rows = [row for of_task, _ in checked for row in of_task]
    print(aligned_table([CHECK_HEADER, *rows]), end="")
    if faults := sum(count for _, count in checked):
        raise UserError(f"{faults} of {len(rows)} splits missing or broken")
    return rows


if __name__ == "__main__":
    main()
