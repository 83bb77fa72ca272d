#!/usr/bin/env python3
"""Write the weights of a saved model as one file in the layout of the original.

    python scripts/export_params.py MODEL --output bort.params [--dtype float16]

MODEL is a checkpoint, the folder of a run, whose newest one is taken, or a classifier. The file has
the matrix that embedding and decoder share under both its names, as GluonNLP's own classes expect.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import build, option, parser_for, required
from bort.errors import UserError, entry_point


@dataclass(frozen=True)
class ExportSettings:
    """What is written."""

    output: str = required("the file, for example bort.params")
    dtype: str = option("float32", "type of the values", choices=("float32", "float16"))


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> list[str]:
    """Export a model; returns the names in the file."""
    import mxnet as mx

    from bort.saved_model import load_model

    parser = parser_for(str(__doc__), ExportSettings)
    parser.add_argument("model", metavar="MODEL", help="a saved model, a checkpoint or a run")
    parsed = vars(parser.parse_args(argv))
    settings = build(ExportSettings, parsed)
    model, model_config, _ = load_model(parsed["model"])
    model.cast(settings.dtype)
    temporary = f"{settings.output}.tmp"
    try:
        model.save_parameters(temporary, deduplicate=False)
        os.replace(temporary, settings.output)
    except (OSError, mx.MXNetError) as error:
        with suppress(OSError):
            os.remove(temporary)
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"--output {settings.output}: cannot be written ({reason})") from None
    names = sorted(model._collect_params_with_prefix())
    size = os.path.getsize(settings.output) / 1e6
    print(
        f"{settings.output}: {len(names)} arrays of {model_config.model}, {model_config.kind}, "
        f"{settings.dtype}, {size:,.1f} MB"
    )
    return names


if __name__ == "__main__":
    main()
