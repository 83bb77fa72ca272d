#!/usr/bin/env python3
"""Convert a Hugging Face model to a saved model.

    python scripts/convert_from_huggingface.py MODEL --output DIRECTORY [--token_types fold]

MODEL is a folder, or a name on the hub, such as bert-base-uncased. It holds a Bort written by
scripts/convert_to_huggingface.py, or a BERT, RoBERTa, DistilBERT or ELECTRA discriminator. It can
be fine-tuned, trained further, and a teacher.
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
class FromHuggingFaceSettings:
    """Output."""

    output: str = required("new folder for the saved model")
    token_types: str = option(
        "keep",
        "BERT's two token types: keep them, or add type 0 to the positions and drop type 1",
        choices=("keep", "fold"),
    )
    revision: Optional[str] = option(
        None, "branch, tag or commit of a model of the hub (default: its main branch)"
    )


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> Optional[float]:
    """Convert a model; returns the largest difference of logits, None where not compared."""
    parser = parser_for(str(__doc__), FromHuggingFaceSettings)
    parser.add_argument(
        "model", metavar="MODEL", help="a folder with config.json, weights and tokenizer, or a name"
    )
    parsed = vars(parser.parse_args(argv))
    settings = build(FromHuggingFaceSettings, parsed)

    from bort.huggingface.check import report
    from bort.huggingface.convert import from_huggingface

    conversion = from_huggingface(
        parsed["model"], settings.output, settings.token_types, settings.revision
    )
    print("\n".join([conversion.description, *conversion.notices]))
    return report(conversion.comparison)


if __name__ == "__main__":
    main()
