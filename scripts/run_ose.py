#!/usr/bin/env python3
"""Search a space of BERT shapes with OSE for the one with the largest W (bort/ose/README.md).

With training: `--data` and `--data_eval` name shards; every candidate is trained on the first, and
its error is measured on the second. The same command resumes an interrupted search. Under
`horovodrun` the ranks share the candidates, with --cluster the workers of a Dask cluster do.

Without training: `--list` shows a space with its closed forms, `--explain` the error at which a
shape would win, and `--errors` searches with errors that were measured elsewhere.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.cluster import ClusterSettings
from bort.config import parse
from bort.errors import entry_point
from bort.ose.config import OSE_CLASSES
from bort.ose.run import run_ose
from bort.ose.search import OseResult


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> Optional[OseResult]:
    """Print and search as the flags say; returns the result of the search, if there was one."""
    *settings, machines = parse(str(__doc__).strip(), argv, *OSE_CLASSES, ClusterSettings)
    return run_ose(*settings, machines.cluster)


if __name__ == "__main__":
    main()
