"""Draw small training sets, dev sets and a test set from the labelled rows of a task."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import parse
from bort.errors import entry_point
from data.subset import SubsetSettings, draw_subsets


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> list[str]:
    """Draw the sets; returns the files written."""
    (settings,) = parse(str(__doc__), argv, SubsetSettings)
    written = draw_subsets(settings)
    print("\n".join(written))
    return written


if __name__ == "__main__":
    main()
