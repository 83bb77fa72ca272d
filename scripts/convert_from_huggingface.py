#!/usr/bin/env python3
"""Bring a folder of transformers' back as a saved model of ours.

    python scripts/convert_from_huggingface.py FOLDER --output DIRECTORY

FOLDER holds a Bort that scripts/convert_to_huggingface.py wrote, or another network of these
classes and this arithmetic, RoBERTa-base and RoBERTa-large among them: those serve as teachers.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import build, parser_for, required
from bort.errors import entry_point


@dataclass(frozen=True)
class FromHuggingFaceSettings:
    """What is written."""

    output: str = required("the folder to make")


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> Optional[float]:
    """Convert a folder; returns the greatest difference of logits, None where none was measured."""
    from bort.files import new_folder
    from bort.huggingface import check as huggingface_check
    from bort.huggingface.folder import read
    from bort.saved_model import load_model, save_model

    parser = parser_for(str(__doc__), FromHuggingFaceSettings)
    parser.add_argument("folder", metavar="FOLDER", help="config.json, weights and tokenizer")
    parsed = vars(parser.parse_args(argv))
    settings = build(FromHuggingFaceSettings, parsed)
    network, model_config, tokenizer = read(parsed["folder"])
    name = f"{model_config.model}.params"
    with new_folder(settings.output) as folder:
        path = os.path.join(folder, name)
        save_model(path, network, model_config, tokenizer)
        size = os.path.getsize(path) / 1e6
        comparison = huggingface_check.compare(load_model(path), parsed["folder"])
    print(f"{os.path.join(settings.output, name)}: {model_config.kind}, {size:,.1f} MB")
    return huggingface_check.report(comparison)


if __name__ == "__main__":
    main()
