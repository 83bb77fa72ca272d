#!/usr/bin/env python3
r"""Pretrain Bort by masked-LM distillation in many processes under Horovod.

The same program and flags as run_pretraining_distillation.py; --batch_size and --accumulate count
for each process. Example:

    horovodrun -np 2 -H localhost:2 python run_pretraining_distillation_hvd.py \
        --data shards/train --data_eval shards/test --num_steps 1000 --ckpt_dir runs/bort
"""

from __future__ import annotations

from typing import Sequence

from bort.communicator import Horovod
from bort.config import parse
from bort.errors import door
from bort.settings import SETTINGS_CLASSES, PretrainingSettings


@door
def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Run the program; returns the held-out evaluations, the first before training."""
    from bort.pretraining import Pretraining

    settings = PretrainingSettings(*parse(__doc__, argv, *SETTINGS_CLASSES))
    return Pretraining(settings, Horovod()).run()


if __name__ == "__main__":
    main()
