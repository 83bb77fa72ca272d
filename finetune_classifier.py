#!/usr/bin/env python3
r"""Fine-tune Bort on a task of GLUE or SuperGLUE or on RACE, in one process or under horovodrun.

Examples:
    python finetune_classifier.py --task_name MRPC --data_dir data/glue \
        --pretrained_parameters model/bort.params --epochs 50
    python finetune_classifier.py --task_name AX --data_dir data/glue --only_inference \
        --model_parameters runs/finetuning/MNLI
"""

from __future__ import annotations

from typing import Sequence

from bort.communicator import communicator_of_environment
from bort.config import parse
from bort.errors import entry_point
from bort.finetuning.config import FINETUNING_CLASSES, ORIGINAL_FLAGS, FinetuningSettings
from bort.types import JSONObject


@entry_point
def main(argv: Sequence[str] | None = None) -> JSONObject:
    """Run the program; returns the content of metrics.json."""
    settings = FinetuningSettings(
        *parse(__doc__, argv, *FINETUNING_CLASSES, config=True, renamed=ORIGINAL_FLAGS)
    )
    from bort.finetuning.run import finetune  # after the flags: --help does not import MXNet

    return finetune(settings, communicator_of_environment())


if __name__ == "__main__":
    main()
