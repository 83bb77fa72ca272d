#!/usr/bin/env python3
r"""Pretrain Bort by masked-LM distillation in many processes under Horovod.

The program and flags of run_pretraining_distillation.py; --batch_size and --accumulate count for
each process. With --elastic training survives the loss of processes. Example:

    horovodrun -np 2 -H localhost:2 python run_pretraining_distillation_hvd.py \
        --data shards/train --data_eval shards/test --num_steps 1000 --ckpt_dir runs/bort
"""

from __future__ import annotations

from typing import Sequence

from bort.communicator import Horovod
from bort.config import parse
from bort.errors import entry_point
from bort.pretraining.config import (
    ORIGINAL_FLAGS,
    SETTINGS_CLASSES,
    ElasticSettings,
    PretrainingSettings,
)


@entry_point
def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Run the program; returns the held-out evaluations, the first before training.

    With --check it only prints what is known before the run, and there are none.
    """
    *parsed, elasticity = parse(
        __doc__, argv, *SETTINGS_CLASSES, ElasticSettings, config=True, renamed=ORIGINAL_FLAGS
    )
    settings = PretrainingSettings(*parsed)
    # After the flags: --help does not import MXNet.
    from bort.pretraining.preflight import preflight
    from bort.pretraining.run import pretrain

    if settings.run.check:
        preflight(settings, Horovod())
        return []
    if elasticity.elastic:
        from bort.pretraining.elastic import run_elastic

        return run_elastic(settings, Horovod())
    return pretrain(settings, Horovod())


if __name__ == "__main__":
    main()
