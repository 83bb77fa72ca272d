#!/usr/bin/env python3
"""Make int8 models of a fine-tuned classifier, and compare them on the development set.

    python scripts/quantize.py MODEL --data_dir data/glue

MODEL is a .params file of finetune_classifier.py or its folder. The models, and a record of how
they were made and what they scored, are written into a folder `int8` beside it, where the runtimes
`onnx-int8` and `mxnet-int8` find them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import build, option, parser_for
from bort.errors import entry_point

if TYPE_CHECKING:
    from bort.inference.quantization import Check, Quantization

MAX_LOSS = 0.5  # points; more is marked


@dataclass(frozen=True)
class QuantizeSettings:
    """Calibration and comparison."""

    data_dir: Optional[str] = option(
        None, "folder of the official data (default: GluonNLP's, $MXNET_HOME/datasets)"
    )
    calibration_inputs: int = option(
        256, "training inputs, evenly spread, that calibrate MXNet's int8", minimum=1
    )
    batch_size: int = option(32, "examples per batch of the comparison", minimum=1)


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> list[Check]:
    """Quantize a classifier; returns the check of each runtime."""
    parser = parser_for(str(__doc__), QuantizeSettings)
    parser.add_argument("model", metavar="MODEL", help="a .params file or its folder")
    parsed = vars(parser.parse_args(argv))
    settings = build(QuantizeSettings, parsed)

    from bort.inference.quantization import Quantization

    quantization = Quantization(parsed["model"], settings.data_dir)
    checks = quantization.quantize(settings.calibration_inputs, settings.batch_size)
    print_checks(quantization, checks)
    return checks


def print_checks(quantization: Quantization, checks: Sequence[Check]) -> None:
    """Print a line per runtime: its score, the points lost, the similarity of its logits."""
    from bort.inference.runtime import int8_folder

    task = quantization.task
    print(f"{task.name}, {task.dev[0]}: {' and '.join(task.headline)} in points")
    print(f"{'runtime':<20}{'score':>8}{'lost':>8}{'cosine of the logits':>24}")
    for check in checks:
        lost = checks[0].score - check.score
        mark = f"  more than {MAX_LOSS} lost" if lost > MAX_LOSS else ""
        print(f"{check.runtime:<20}{check.score:8.2f}{lost:8.2f}{check.cosine:24.5f}{mark}")
    print(f"{int8_folder(quantization.path)}: onnx-int8, mxnet-int8")


if __name__ == "__main__":
    main()
