"""Agora on three toy tasks whose training sets are scarce and biased: a table and a plot.

    python -m scripts.agora_toys --seeds 30 --plot agora_toys.png --table agora_toys.md

Four models are compared on the test set of every draw: the best of the grid by dev score (the first
round of Agora), Agora, Agora with as many augmented examples of random dev rows instead of
mistakes, and Timaeus itself. Needs scikit-learn and Matplotlib.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.agora.toys import ToySettings, run_toys
from bort.config import parse
from bort.errors import entry_point

# isort: split
import numpy as np  # after bort: a Ctrl-C during the import is then one line


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> dict[str, np.ndarray]:
    """Compare the methods on every task; returns accuracies [seeds, methods] by task."""
    (settings,) = parse(str(__doc__), argv, ToySettings)
    return run_toys(settings)


if __name__ == "__main__":
    main()
