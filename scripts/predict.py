#!/usr/bin/env python3
r"""Ask a saved model about new text: a class with its probability, a score, or words for masks.

Examples:
    echo "a fine film" | python scripts/predict.py --model_parameters runs/example/SST-2
    echo "the cat sat on the <mask>" | python scripts/predict.py --fill_mask \
        --model_parameters runs/TEST/bort

A line of the input is one input, with a tab between the texts of a pair; or a line of a table
(TSV) with a header, or a JSON object, with the task's own columns or keys, or with text, or text1,
text2, ... Of a choice the first text is the common one, the others are the options; of ReCoRD the
first is the passage, the second the query with @placeholder, the others are the candidates.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import option, parse, required
from bort.errors import UserError, entry_point
from bort.inference.prediction_files import INPUT_FORMATS, OUTPUT_FORMATS
from bort.inference.runtime import BACKENDS


@dataclass(frozen=True)
class PredictSettings:
    """What is asked, and where the answers go."""

    model_parameters: str = required("a saved model: its .params file, its folder, or a run")
    task: Optional[str] = option(
        None, "checked against the model's own; AX, AX-b, AX-g: read their rows instead"
    )
    input: str = option("-", "the file of inputs; - is standard input")
    input_format: str = option(
        "auto", "auto goes by the file's name, then by the first line", choices=INPUT_FORMATS
    )
    output: Optional[str] = option(None, "the file of answers (default: standard output)")
    format: str = option(
        "tsv", "of the answers: label and probability, or JSON lines", choices=OUTPUT_FORMATS
    )
    fill_mask: bool = option(False, "five words for each <mask>, from a pretrained model")
    runtime: str = option(
        "mxnet", "int8 ones are made by scripts/quantize.py first", choices=BACKENDS
    )
    batch_size: int = option(32, "inputs in one forward pass", minimum=1)

    def check(self) -> None:
        """Raise `UserError` for flags that do not go together."""
        if self.fill_mask and self.task:
            raise UserError("--fill_mask: a pretrained model is of no task; leave --task out")
        if self.fill_mask and self.runtime != "mxnet":
            raise UserError(f"--runtime {self.runtime}: --fill_mask runs in mxnet alone")


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Answer every line of the input; returns the number of answers."""
    from bort.inference.prediction_files import opened, written

    (settings,) = parse(str(__doc__), argv, PredictSettings)
    with opened(settings.input) as lines:
        predictor = load(settings)
        with written(settings.output) as output:
            try:
                return answer_lines(settings, predictor, lines, output)
            except BrokenPipeError:  # whoever reads has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0


def load(settings: PredictSettings) -> Any:
    """Load the model that the flags name."""
    from bort.inference.pipelines import load_classifier, load_mask_filler

    if settings.fill_mask:
        return load_mask_filler(settings.model_parameters, settings.batch_size)
    return load_classifier(
        settings.model_parameters, settings.task, settings.runtime, settings.batch_size
    )


def answer_lines(settings: PredictSettings, predictor: Any, lines: Any, output: BinaryIO) -> int:
    """Write the answers as they come; returns their number."""
    from bort.inference.pipelines import answers
    from bort.inference.prediction_files import Inputs, json_line, table_line

    inputs = Inputs(lines, settings.input_format, predictor.columns, predictor.official_columns)
    count = 0
    for window in answers(predictor, inputs, inputs.ready):
        for number, found in window:
            line = json_line(number, found) if settings.format == "json" else table_line(found)
            output.write(f"{line}\n".encode())
        output.flush()
        count += len(window)
    return count


if __name__ == "__main__":
    main()
