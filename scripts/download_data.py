"""Download and verify the data of GLUE and SuperGLUE tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import OneLineParser
from bort.errors import entry_point
from data.download import SERVER, download
from data.task import default_data_dir, expanded


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> Path:
    """Download the tasks named on the command line; returns the data folder."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="tasks, or glue, superglue, race, all")
    parser.add_argument(
        "--data_dir",
        default=default_data_dir(),
        help="folder for the data (default %(default)s)",
    )
    parser.add_argument(
        "--server", default=SERVER, help="an https mirror with the same paths (default %(default)s)"
    )
    arguments = parser.parse_args(argv)
    data_dir = expanded(arguments.data_dir)
    download(arguments.names, data_dir, arguments.server)
    return data_dir


if __name__ == "__main__":
    main()
