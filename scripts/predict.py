#!/usr/bin/env python3
r"""Predict new text with a saved model: a class with its probability, a score, or words for masks.

Examples:
    echo "a fine film" | python scripts/predict.py --model_parameters runs/example/SST-2
    echo "the cat sat on the <mask>" | python scripts/predict.py --fill_mask \
        --model_parameters runs/TEST/bort

A line of the input is one input: one text, or several separated by tabs; a line of a table (TSV)
with a header; or a JSON object. Columns and keys are the task's own, or text, or text1, text2, ...
For a multiple choice the first text is the common one, the others are the options; for ReCoRD the
first is the passage, the second the query with @placeholder, the others are the candidates.
scripts/README.md has a table of all forms.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import option, parse, required
from bort.errors import UserError, entry_point
from bort.inference.prediction_files import INPUT_FORMATS, OUTPUT_FORMATS
from bort.inference.runtime import BACKENDS


@dataclass(frozen=True)
class PredictSettings:
    """Model, input and output."""

    model_parameters: str = required("saved model: its .params file, its folder, or a run")
    task: Optional[str] = option(
        None, "must be the model's own task, or AX, AX-b or AX-g to read their rows"
    )
    input: str = option("-", "file of inputs; - is standard input")
    input_format: str = option(
        "auto", "auto: by the file's extension, else by the first line", choices=INPUT_FORMATS
    )
    output: Optional[str] = option(None, "file of predictions (default: standard output)")
    format: str = option(
        "tsv", "output: label and probability, or JSON lines", choices=OUTPUT_FORMATS
    )
    fill_mask: bool = option(
        False, "predict five words for each <mask> (BERT: [MASK]), with a pretrained model"
    )
    runtime: str = option(
        "mxnet",
        "the int8 models are made by scripts/quantize.py; auto: the fastest in float32 that is "
        "installed",
        choices=(*BACKENDS, "auto"),
    )
    batch_size: int = option(32, "inputs per forward pass", minimum=1)

    def check(self) -> None:
        """Raise `UserError` for flags that contradict each other."""
        if self.fill_mask and self.task:
            raise UserError("--fill_mask: a pretrained model has no task; leave --task out")
        if self.fill_mask and self.runtime not in ("mxnet", "auto"):
            raise UserError(f"--runtime {self.runtime}: --fill_mask supports mxnet only")


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Predict every line of the input; returns the number of predictions."""
    from bort.files import refuse_overwriting
    from bort.inference.prediction_files import STDIN, predict_file

    (settings,) = parse(str(__doc__), argv, PredictSettings)
    refuse_overwriting(settings.output, "/dev/stdin" if settings.input == STDIN else settings.input)
    return predict_file(
        lambda: load(settings),
        settings.input,
        settings.output,
        settings.input_format,
        settings.format,
    )


def load(settings: PredictSettings) -> Any:
    """Load the model that the flags name."""
    from bort.files import refuse_overwriting
    from bort.inference.pipelines import load_classifier, load_mask_filler
    from bort.inference.runtime import onnx_path
    from bort.parameters import parameter_file
    from bort.saved_model import model_config_path

    found = parameter_file(settings.model_parameters)
    refuse_overwriting(settings.output, found, model_config_path(found), onnx_path(found))
    if settings.fill_mask:
        return load_mask_filler(found, settings.batch_size)
    return load_classifier(found, settings.task, settings.runtime, settings.batch_size)


if __name__ == "__main__":
    main()
