#!/usr/bin/env python3
r"""Fine-tune on scarce data with Agora: a search space, a labeller, augmented examples of mistakes.

    python scripts/run_agora.py --task_name SST-2 --data_dir DATA --timaeus MODEL \
        --pretrained_parameters RUN --search_space scripts/agora_spaces/many_rows.yaml

The same command resumes an interrupted run. Under horovodrun the ranks share the fits, with
--cluster the workers of a Dask cluster do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.agora.config import AGORA_CLASSES, WITHOUT_FLAG, AgoraTextSettings
from bort.cluster import ClusterSettings
from bort.config import parse
from bort.errors import entry_point
from bort.types import JSONObject


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> JSONObject:
    """Run Agora as the flags say; returns the content of agora.json."""
    classes = (*AGORA_CLASSES, ClusterSettings)
    *settings, machines = parse(str(__doc__), argv, *classes, without=WITHOUT_FLAG)

    from bort.agora.run import run_agora

    return run_agora(AgoraTextSettings(*settings), machines.cluster)


if __name__ == "__main__":
    main()
