#!/usr/bin/env python3
r"""Fine-tune with every combination of a grid of hyperparameters, and print their table.

All flags of finetune_classifier.py but --only_inference apply to every run. The same command
resumes an interrupted sweep.

With --cluster the runs go to the workers of a Dask cluster.

Example:
    python scripts/sweep.py --task_name RTE --grid scripts/agora_spaces/published.yaml --jobs 4 \
        --pretrained_parameters runs/pretraining
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.cluster import ClusterSettings
from bort.config import parse
from bort.errors import entry_point
from bort.finetuning.config import FINETUNING_CLASSES, ORIGINAL_FLAGS, FinetuningSettings
from bort.finetuning.sweep import SweepRow, SweepSettings, sweep


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> list[SweepRow]:
    """Run the sweep; returns the table's rows, best first."""
    classes = (*FINETUNING_CLASSES, SweepSettings, ClusterSettings)
    *base, settings, machines = parse(
        str(__doc__), argv, *classes, renamed=ORIGINAL_FLAGS, without=("only_inference",)
    )
    return sweep(settings, FinetuningSettings(*base), machines.cluster)


if __name__ == "__main__":
    main()
