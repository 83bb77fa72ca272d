#!/usr/bin/env python3
"""Write a saved model as an ONNX file of standard operators.

    python scripts/export_onnx.py MODEL [--output best.onnx]

MODEL is a .params file or its folder: a fine-tuned classifier, a pretraining checkpoint or run.
Batch and length are dynamic axes. Inputs: input_ids int64 [batch, length], padded at the end, and
valid_length int64 [batch]. A classifier has one output, scores [batch, outputs]. A masked-LM
network also takes positions int64 [masks], indices into the flattened [batch * length], and
returns logits [masks, vocabulary].
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import build, option, parser_for
from bort.errors import entry_point


@dataclass(frozen=True)
class OnnxSettings:
    """Output."""

    output: Optional[str] = option(
        None, "ONNX file (default: beside the parameters, where the runtime `onnx` looks for it)"
    )


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> float:
    """Export a model; returns the largest difference between ONNX Runtime and MXNet."""
    parser = parser_for(str(__doc__), OnnxSettings)
    parser.add_argument("model", metavar="MODEL", help="a .params file, its folder, or a run")
    parsed = vars(parser.parse_args(argv))
    settings = build(OnnxSettings, parsed)

    from bort.inference.onnx_export import export_onnx

    export = export_onnx(parsed["model"], settings.output)
    print(f"{export.path}: {export.description}")
    print(
        f"largest difference from MXNet {export.difference:.1e}, of values up to "
        f"{export.largest:.2f}, on random inputs with padding"
    )
    return export.difference


if __name__ == "__main__":
    main()
