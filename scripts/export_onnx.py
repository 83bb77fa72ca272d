#!/usr/bin/env python3
"""Write a saved model as an ONNX file of standard operators, or as a folder of Hugging Face's.

    python scripts/export_onnx.py MODEL [--output best.onnx]
    python scripts/export_onnx.py MODEL --layout huggingface --output FOLDER

MODEL is a .params file or its folder: a fine-tuned classifier, a pretraining checkpoint or run.
Batch and length are dynamic axes. Inputs: input_ids int64 [batch, length], padded at the end, and
valid_length int64 [batch]. A classifier has one output, scores [batch, outputs]. A masked-LM
network also takes positions int64 [masks], indices into the flattened [batch * length], and
returns logits [masks, vocabulary].

With `--layout huggingface` a new folder is written that optimum and transformers.js load: config,
tokenizer, onnx/model.onnx and onnx/model_quantized.onnx, which is int8, with the inputs input_ids,
attention_mask and, for a model with token types, token_type_ids, and the output logits.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import build, option, parser_for
from bort.errors import UserError, entry_point


@dataclass(frozen=True)
class OnnxSettings:
    """Output."""

    output: Optional[str] = option(
        None,
        "ONNX file (default: beside the parameters, where the runtime `onnx` looks for it); with "
        "--layout huggingface a new folder",
    )
    layout: str = option(
        "file",
        "one file, or a folder with the names that optimum and transformers.js expect",
        choices=("file", "huggingface"),
    )

    def check(self) -> None:
        """Raise `UserError` when the folder of Hugging Face's layout has no name."""
        if self.layout == "huggingface" and not self.output:
            raise UserError("--layout huggingface: needs --output, the name of a new folder")


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> float:
    """Export a model; returns the largest difference between ONNX Runtime and MXNet."""
    parser = parser_for(str(__doc__), OnnxSettings)
    parser.add_argument("model", metavar="MODEL", help="a .params file, its folder, or a run")
    parsed = vars(parser.parse_args(argv))
    settings = build(OnnxSettings, parsed)

    if settings.layout == "huggingface":
        return _export_folder(parsed["model"], str(settings.output))
    return _export_file(parsed["model"], settings.output)


def _export_file(model: str, output: Optional[str]) -> float:
    from bort.inference.onnx_export import export_onnx

    export = export_onnx(model, output)
    print(f"{export.path}: {export.description}")
    _print_difference(export.difference, export.largest)
    return export.difference


def _export_folder(model: str, output: str) -> float:
    from bort.deployment.onnx_folder import export_folder

    export = export_folder(model, output)
    print(export.description)
    comparison = export.comparison
    _print_difference(comparison.difference, comparison.largest)
    print(f"int8: the cosine similarity of the same logits is {comparison.cosine:.5f}")
    return comparison.difference


def _print_difference(difference: float, largest: float) -> None:
    print(
        f"largest difference from MXNet {difference:.1e}, of values up to {largest:.2f}, on random "
        "inputs with padding"
    )


if __name__ == "__main__":
    main()
