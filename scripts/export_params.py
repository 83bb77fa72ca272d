#!/usr/bin/env python3
"""Export the parameters of a saved model to one file in the layout of the original.

    python scripts/export_params.py MODEL --output bort.params [--dtype float16]

MODEL is a checkpoint, the folder of a run (its newest checkpoint), or a classifier. The file holds
the matrix that embedding and decoder share under both its names, as GluonNLP's classes expect.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import build, option, parser_for, required
from bort.errors import UserError, entry_point
from bort.types import Block


@dataclass(frozen=True)
class ExportSettings:
    """Output."""

    output: str = required("parameter file, for example bort.params")
    dtype: str = option("float32", "type of the parameters", choices=("float32", "float16"))


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> list[str]:
    """Export a model; returns the names in the file."""
    parser = parser_for(str(__doc__), ExportSettings)
    parser.add_argument("model", metavar="MODEL", help="a saved model, a checkpoint or a run")
    parsed = vars(parser.parse_args(argv))
    settings = build(ExportSettings, parsed)
    return export(parsed["model"], settings.output, settings.dtype)


def export(path: str, output: str, dtype: str) -> list[str]:
    """Write the parameters of a saved model to a file; returns their names.

    Raises `UserError` when the model cannot be loaded or is not one of GluonNLP's and the
    original's, whose LayerNorms, embeddings and pooling are Bort's, when a parameter is NaN or
    infinite in `dtype`, and when the file cannot be written or has the name of another model.
    """
    from bort.files import refuse_overwriting, summary_stream
    from bort.parameters import check_finite, parameter_file
    from bort.saved_model import load_model, model_config_path
    from bort.shapes import BORT_OPTIONS, CLS

    found = parameter_file(path)
    refuse_overwriting(output, found, model_config_path(found))
    config = model_config_path(output)
    if os.path.exists(config):
        raise UserError(
            f"--output {output}: {config} says that another model has this name; name another file"
        )
    model, model_config, _ = load_model(found)
    if model_config.body_options != BORT_OPTIONS:
        raise UserError(
            f"{path}: a bare parameter file cannot say that the model has token types or the "
            f"layer_norm_eps {model_config.layer_norm_eps}; use scripts/convert_to_huggingface.py"
        )
    if model_config.pooling != CLS:
        raise UserError(
            f"{path}: a bare parameter file cannot say that the classifier was trained with "
            f"--pooling {model_config.pooling}, and the original's takes the first token; use "
            "scripts/export_onnx.py"
        )
    model.cast(dtype)
    check_finite(f"{path} in {dtype}", model)
    size = _write(model, output) / 1e6
    names = sorted(model._collect_params_with_prefix())
    print(
        f"{output}: {len(names)} arrays of {model_config.model}, {model_config.kind}, {dtype}, "
        f"{size:,.1f} MB",
        file=summary_stream(output),
    )
    return names


def _write(model: Block, output: str) -> int:
    """Write the parameters; returns the bytes. MXNet writes to paths only, not to a FIFO."""
    from bort.files import atomic_path, atomic_write, is_stream, remove_left_overs_of
    from bort.parameters import save_parameters
    from bort.sums import write_sums

    if not is_stream(output):
        remove_left_overs_of(output)
        with atomic_path(output) as temporary:
            save_parameters(model, temporary, deduplicate=False)
        folder, name = os.path.split(output)
        write_sums(folder, [name])
        return os.path.getsize(output)
    with tempfile.TemporaryDirectory() as folder, atomic_write(output, "wb") as stream:
        path = os.path.join(folder, "model.params")
        save_parameters(model, path, deduplicate=False)
        with open(path, "rb") as file:
            shutil.copyfileobj(file, stream)
        return os.path.getsize(path)


if __name__ == "__main__":
    main()
