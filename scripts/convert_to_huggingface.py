#!/usr/bin/env python3
"""Write a saved model as a folder that transformers loads.

    python scripts/convert_to_huggingface.py MODEL --output FOLDER [--family bert]

MODEL is a saved model: its .params file or folder, or a pretraining checkpoint or run. Where torch
and transformers are installed, the folder is loaded and its logits and tokens compared with ours.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import build, option, parser_for, required
from bort.errors import entry_point


@dataclass(frozen=True)
class ToHuggingFaceSettings:
    """What is written."""

    output: str = required("the folder to make")
    family: str = option(
        "roberta", "classes that load it: Roberta... or Bert...", choices=("roberta", "bert")
    )


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> Optional[float]:
    """Convert a model; returns the greatest difference of logits, None where none was measured."""
    from bort.files import new_folder
    from bort.huggingface import check as huggingface_check
    from bort.huggingface.folder import write
    from bort.saved_model import load_model

    parser = parser_for(str(__doc__), ToHuggingFaceSettings)
    parser.add_argument("model", metavar="MODEL", help="a saved model, a checkpoint or a run")
    parsed = vars(parser.parse_args(argv))
    settings = build(ToHuggingFaceSettings, parsed)
    saved = load_model(parsed["model"])
    with new_folder(settings.output) as folder:
        architecture = write(folder, saved, settings.family)
        size = sum(one.stat().st_size for one in os.scandir(folder)) / 1e6
        comparison = huggingface_check.compare(saved, folder)
    print(f"{settings.output}: {architecture.name} of {saved.model_config.model}, {size:,.1f} MB")
    return huggingface_check.report(comparison)


if __name__ == "__main__":
    main()
