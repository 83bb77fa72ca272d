#!/usr/bin/env python3
r"""Pretrain Bort by masked-LM distillation in one process: CPU, or one or more GPUs.

Example, on shards made by create_pretraining_data.py:

    python run_pretraining_distillation.py --data shards/train --data_eval shards/test \
        --teacher_model roberta_24_1024_16 --teacher_ckpt_dir model/roberta.params \
        --num_steps 100000 --batch_size 16 --ckpt_dir runs/bort
"""

from __future__ import annotations

from typing import Sequence

from bort.communicator import only_process
from bort.config import parse
from bort.errors import entry_point
from bort.pretraining.config import ORIGINAL_FLAGS, SETTINGS_CLASSES, PretrainingSettings


@entry_point
def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Run the program; returns the held-out evaluations, the first before training.

    With --check it only prints what is known before the run, and there are none.
    """
    settings = PretrainingSettings(
        *parse(__doc__, argv, *SETTINGS_CLASSES, config=True, renamed=ORIGINAL_FLAGS)
    )
    alone = only_process("run_pretraining_distillation_hvd.py")
    # After the flags: --help does not import MXNet.
    from bort.pretraining.preflight import preflight
    from bort.pretraining.run import pretrain

    if settings.run.check:
        preflight(settings, alone)
        return []
    return pretrain(settings, alone)


if __name__ == "__main__":
    main()
