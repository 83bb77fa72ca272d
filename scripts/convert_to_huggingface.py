#!/usr/bin/env python3
"""Convert a saved model to a folder that transformers loads.

    python scripts/convert_to_huggingface.py MODEL --output FOLDER [--family bert]

MODEL is a saved model: its .params file or folder, or a pretraining checkpoint or run. Where torch
and transformers are installed, the folder is loaded and its logits and tokens compared with ours.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import build, option, parser_for, required
from bort.errors import entry_point


@dataclass(frozen=True)
class ToHuggingFaceSettings:
    """Output."""

    output: str = required("new folder for the converted model")
    family: Optional[str] = option(
        None,
        "classes that load the model: Roberta... or Bert... (default: Bert... for a WordPiece "
        "vocabulary)",
        choices=("roberta", "bert"),
    )


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> Optional[float]:
    """Convert a model; returns the largest difference of logits, None where not compared."""
    parser = parser_for(str(__doc__), ToHuggingFaceSettings)
    parser.add_argument("model", metavar="MODEL", help="a saved model, a checkpoint or a run")
    parsed = vars(parser.parse_args(argv))
    settings = build(ToHuggingFaceSettings, parsed)

    from bort.huggingface.check import report
    from bort.huggingface.convert import to_huggingface

    conversion = to_huggingface(parsed["model"], settings.output, settings.family)
    print(conversion.description)
    return report(conversion.comparison)


if __name__ == "__main__":
    main()
