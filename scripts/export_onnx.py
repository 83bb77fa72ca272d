#!/usr/bin/env python3
"""Write a saved model as an ONNX file of standard operators.

    python scripts/export_onnx.py MODEL [--output best.onnx]

MODEL is a .params file or its folder: a fine-tuned classifier, a pretraining checkpoint or run.
Batch and length are free. Inputs: input_ids int64 [batch, length], padded at the end, and
valid_length int64 [batch]. A classifier has one output, scores [batch, outputs]. A masked-LM
network takes positions int64 [masks] too, which count through the flattened [batch * length], and
returns logits [masks, vocabulary].
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import build, option, parser_for
from bort.errors import UserError, entry_point


@dataclass(frozen=True)
class OnnxSettings:
    """What is written."""

    output: Optional[str] = option(
        None, "the file; without: beside the parameters, where the runtime `onnx` looks for it"
    )


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> float:
    """Export a model; returns the largest difference between ONNX Runtime and MXNet."""
    from bort import saved_model
    from bort.inference import onnx_graph as onnx_export
    from bort.inference import runtime
    from bort.parameters import parameter_file

    parser = parser_for(str(__doc__), OnnxSettings)
    parser.add_argument("model", metavar="MODEL", help="a .params file, its folder, or a run")
    parsed = vars(parser.parse_args(argv))
    source = parameter_file(parsed["model"])
    path = build(OnnxSettings, parsed).output or runtime.onnx_file(source)
    saved = saved_model.load_model(source)
    notes = runtime.notes_of(source, saved.model_config)
    graph = onnx_export.build(saved.network, notes=notes)
    session = runtime.onnx_session(graph.SerializeToString())
    difference, largest = onnx_export.difference(saved.network, session)
    if difference > onnx_export.TOLERANCE * max(1.0, largest):
        raise UserError(
            f"{source}: ONNX Runtime differs from MXNet by {difference:.1e}; nothing is "
            "written. Are the parameters finite?"
        )
    onnx_export.write(graph, path)
    megabytes = os.path.getsize(path) / 1e6
    print(
        f"{path}: {saved.model_config.kind} of {saved.model_config.model}, "
        f"{len(graph.graph.node)} nodes, opset {onnx_export.OPSET}, {megabytes:,.1f} MB"
    )
    print(
        f"largest difference from MXNet {difference:.1e}, of values up to {largest:.2f}, on random "
        "inputs with padding"
    )
    return difference


if __name__ == "__main__":
    main()
