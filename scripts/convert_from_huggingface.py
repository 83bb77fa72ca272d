#!/usr/bin/env python3
"""Convert a Hugging Face folder to a saved model.

    python scripts/convert_from_huggingface.py FOLDER --output DIRECTORY

FOLDER holds a Bort written by scripts/convert_to_huggingface.py, or another network of the same
classes and arithmetic, such as RoBERTa-base and RoBERTa-large, which can be teachers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import build, parser_for, required
from bort.errors import entry_point


@dataclass(frozen=True)
class FromHuggingFaceSettings:
    """Output."""

    output: str = required("new folder for the saved model")


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> Optional[float]:
    """Convert a folder; returns the largest difference of logits, None where not compared."""
    parser = parser_for(str(__doc__), FromHuggingFaceSettings)
    parser.add_argument("folder", metavar="FOLDER", help="config.json, weights and tokenizer")
    parsed = vars(parser.parse_args(argv))
    settings = build(FromHuggingFaceSettings, parsed)

    from bort.huggingface.check import report
    from bort.huggingface.convert import from_huggingface

    conversion = from_huggingface(parsed["folder"], settings.output)
    print(conversion.description)
    return report(conversion.comparison)


if __name__ == "__main__":
    main()
