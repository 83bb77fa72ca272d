#!/usr/bin/env python3
"""Write the weights of a checkpoint as one file in the layout of the released model.

    python scripts/export_params.py CHECKPOINT --output bort.params [--dtype float16]

CHECKPOINT is a checkpoint's folder or a run's, whose newest one is taken. The file holds the matrix
that embedding and decoder share under both names, as GluonNLP's own classes expect.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Optional, Sequence

from bort.config import build, option, parser_for, read_json, required
from bort.errors import UserError, door


@dataclass(frozen=True)
class ExportSettings:
    """What is written."""

    output: str = required("the file, for example bort.params")
    dtype: str = option("float32", "type of the values", choices=("float32", "float16"))


@door
def main(argv: Optional[Sequence[str]] = None) -> list[str]:
    """Export a checkpoint; returns the names in the file."""
    import mxnet as mx

    from bort import checkpoint
    from bort.bort import get_bort_model, load_parameters
    from bort.teacher import parameter_file

    parser = parser_for(str(__doc__), ExportSettings)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint or a run")
    parsed = vars(parser.parse_args(argv))
    settings = build(ExportSettings, parsed)
    source = parameter_file(parsed["checkpoint"])
    state_path = os.path.join(os.path.dirname(source), checkpoint.STATE)
    if not os.path.exists(state_path):
        raise UserError(f"{parsed['checkpoint']}: is no checkpoint ({checkpoint.STATE} is missing)")
    state = read_json(state_path)
    model, _ = get_bort_model(state["model"], vocab=range(state["vocab_size"]), ctx=mx.cpu())
    load_parameters(model, source)
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
        f"{settings.output}: {len(names)} arrays of {state['model']}, step {state['step']}, "
        f"{settings.dtype}, {size:,.1f} MB"
    )
    return names


if __name__ == "__main__":
    main()
