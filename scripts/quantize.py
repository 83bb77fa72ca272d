#!/usr/bin/env python3
"""Make the int8 models of a fine-tuned classifier, and show what int8 costs on the dev set.

    python scripts/quantize.py MODEL --data_dir data/glue

MODEL is a .params file of finetune_classifier.py or its folder. The models, and a record of how
they were made and what they scored, go into a folder `int8` beside it, where the runtimes
`onnx-int8` and `mxnet-int8` find them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import build, option, parser_for
from bort.errors import entry_point

MOST_LOST = 0.5


@dataclass(frozen=True)
class QuantizeSettings:
    """What the fixed scales are calibrated with, and what the models are compared on."""

    data_dir: Optional[str] = option(
        None, "folder of the official data (default: GluonNLP's, $MXNET_HOME/datasets)"
    )
    calibration_inputs: int = option(
        256, "inputs of the training set, evenly spread, to calibrate MXNet's int8 with", minimum=1
    )
    batch_size: int = option(32, "examples per batch of the comparison", minimum=1)


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> list[Any]:
    """Quantise a classifier; returns a `bort.inference.quantization.Check` for each runtime."""
    from bort.inference.quantization import Quantization
    from bort.inference.runtime import int8_folder

    parser = parser_for(str(__doc__), QuantizeSettings)
    parser.add_argument("model", metavar="MODEL", help="a .params file or its folder")
    parsed = vars(parser.parse_args(argv))
    settings = build(QuantizeSettings, parsed)
    work = Quantization(parsed["model"], settings.data_dir)
    checks = work.quantize(settings.calibration_inputs, settings.batch_size)
    task = work.task
    print(f"{task.name}, {task.dev[0]}: {' and '.join(task.headline)} in points")
    print(f"{'runtime':<16}{'score':>8}{'lost':>8}{'cosine of the scores':>24}")
    for check in checks:
        lost = checks[0].score - check.score
        mark = f"  more than {MOST_LOST} lost" if lost > MOST_LOST else ""
        print(f"{check.runtime:<16}{check.score:8.2f}{lost:8.2f}{check.cosine:24.5f}{mark}")
    print(f"{int8_folder(work.path)}: onnx-int8, mxnet-int8")
    return checks


if __name__ == "__main__":
    main()
