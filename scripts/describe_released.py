#!/usr/bin/env python3
"""Write model/bort.json and model/tokenizer/, which belong to the released parameters.

    python scripts/describe_released.py

scripts/download_model.sh calls it. The vocabulary comes from GluonNLP's cache or is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import OneLineParser
from bort.errors import entry_point
from bort.saved_model import MASKED_LM, ModelConfig, save_model_config
from bort.tokenization import RELEASED_DATASET, TokenizerSettings, load_tokenizer

# Of this checkout, from whatever folder the program is started.
MODEL = str(Path(__file__).resolve().parents[1] / "model" / "bort.params")
SHAPE = "bort_4_8_768_1024"


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> ModelConfig:
    """Write model config and tokenizer; returns the model config."""
    OneLineParser(description=__doc__).parse_args(argv)
    tokenizer = load_tokenizer(TokenizerSettings(RELEASED_DATASET))
    model_config = ModelConfig(SHAPE, tokenizer.vocab_size, tokenizer.fingerprint, MASKED_LM)
    save_model_config(MODEL, model_config, tokenizer)
    return model_config


if __name__ == "__main__":
    main()
