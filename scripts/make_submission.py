"""Check the predictions of fine-tuning runs and pack them for GLUE or SuperGLUE."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import OneLineParser
from bort.errors import entry_point, printable
from bort.files import summary_stream
from data.submission import Entry, gather, write_archive
from data.tasks import LEADERBOARDS


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> list[Entry]:
    """Check every file, write the archive, and return its entries."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("suite", choices=LEADERBOARDS)
    parser.add_argument(
        "--runs", type=Path, required=True, help="folder with one run per task (required)"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="the .zip file to write (required)"
    )
    parser.add_argument(
        "--data_dir",
        type=Path,
        help="data that were predicted; needed for other than the official test sets",
    )
    parser.add_argument(
        "--fill_missing",
        action="store_true",
        help="for a task without predictions, write a file of its first label",
    )
    arguments = parser.parse_args(argv)
    entries = gather(arguments.suite, arguments.runs, arguments.data_dir, arguments.fill_missing)
    write_archive(arguments.output, entries)
    lines = [f"{one.name:<14}{one.rows:>8} rows  {printable(one.origin)}" for one in entries]
    lines.append(f"{arguments.output}: {len(entries)} files")
    print("\n".join(lines), file=summary_stream(str(arguments.output)))
    return entries


if __name__ == "__main__":
    main()
