#!/usr/bin/env python3
r"""Fine-tune with every set of hyperparameters of a grid, and print their table.

All flags of finetune_classifier.py hold for every run. The same command goes on with a sweep that
was interrupted.

Example:
    python scripts/sweep.py --task_name RTE --grid scripts/agora_spaces/published.yaml --jobs 4 \
        --pretrained_parameters runs/pretraining
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import parse
from bort.errors import entry_point
from bort.finetuning.config import FINETUNING_CLASSES, FinetuningSettings
from bort.finetuning.sweep import Row, SweepSettings, sweep


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> list[Row]:
    """Run the sweep; returns the table's rows, best first."""
    *base, settings = parse(str(__doc__), argv, *FINETUNING_CLASSES, SweepSettings)
    return sweep(settings, FinetuningSettings(*base))


if __name__ == "__main__":
    main()
