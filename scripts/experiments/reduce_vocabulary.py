#!/usr/bin/env python3
"""Reduce a WordPiece masked LM to the pieces that are most frequent in a text.

    python scripts/experiments/reduce_vocabulary.py MODEL --text FILE --output FOLDER

MODEL is a saved model, a checkpoint or a run with its tokenizer. FOLDER gets the same network with
the rows of its word embeddings that are kept, and the tokenizer of these pieces, which splits the
other words into smaller ones. A small student's time goes into the projection onto the vocabulary:
with 4,096 pieces instead of 30,522 the shape of its encoder decides cost and size.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's code

import numpy as np

from bort.config import build, option, parser_for, required
from bort.errors import UserError, entry_point
from bort.files import new_folder
from bort.tokenization import read_lines
from bort.wordpiece import CONTINUATION, WordPiece

if TYPE_CHECKING:
    from bort.saved_model import SavedModel


@dataclass(frozen=True)
class ReduceSettings:
    """Text and vocabulary."""

    text: str = required("file of text, whose pieces are counted")
    output: str = required("new folder for the reduced model")
    pieces: int = option(4096, "size of the new vocabulary", minimum=1)


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Write the reduced model, and print the share of the text's pieces that it keeps."""
    parser = parser_for(str(__doc__), ReduceSettings)
    parser.add_argument("model", metavar="MODEL", help="saved model, checkpoint or run")
    parsed = vars(parser.parse_args(argv))
    settings = build(ReduceSettings, parsed)
    # After the flags: --help does not import MXNet.
    from bort.saved_model import MASKED_LM, load_model, save_model

    saved = load_model(parsed["model"])
    tokenizer = saved.tokenizer
    if not isinstance(tokenizer, WordPiece) or saved.model_config.kind != MASKED_LM:
        raise UserError(f"{parsed['model']}: must be a masked LM with a WordPiece tokenizer")
    counts = count_pieces(tokenizer, settings.text)
    kept = frequent_pieces(tokenizer, counts, settings.pieces)
    reduced = reduced_model(saved, tokenizer, kept)
    with new_folder(settings.output) as folder:
        save_model(str(Path(folder, "model.params")), *reduced)
    print(f"kept {len(kept):,} pieces, {counts[kept].sum() / counts.sum():.1%} of the text's")


def count_pieces(tokenizer: WordPiece, path: str) -> np.ndarray:
    """Return how often each piece occurs in a file of text, int64 [vocabulary]."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for line in read_lines(path):
        np.add.at(counts, tokenizer.encode(line), 1)
    if not counts.sum():
        raise UserError(f"{path}: holds no text")
    return counts


def frequent_pieces(tokenizer: WordPiece, counts: np.ndarray, pieces: int) -> np.ndarray:
    """Return the ids of special tokens, ASCII characters and the most frequent others, sorted."""
    spelling = tokenizer.tokens(range(tokenizer.vocab_size))
    plain = [token.removeprefix(CONTINUATION) for token in spelling]
    needed = np.array([len(token) == 1 and token.isascii() for token in plain])
    needed[tokenizer.special_ids] = True
    if not needed.sum() <= pieces <= len(needed):
        raise UserError(
            f"--pieces {pieces}: must be from {needed.sum()}, the special tokens and ASCII "
            f"characters, to {len(needed)}, the whole vocabulary"
        )
    order = np.lexsort((-counts, ~needed))  # by count, the needed ones first
    return np.sort(order[:pieces])


def reduced_model(
    saved: SavedModel, tokenizer: WordPiece, kept: np.ndarray
) -> tuple[object, object, WordPiece]:
    """Return network, model config and tokenizer with the pieces of these ids alone."""
    from mxnet import nd

    from bort.bort import get_bort_model

    smaller = WordPiece(tokenizer.tokens(kept), tokenizer.normalizer)
    separator = saved.model_config.type_separator
    config = replace(
        saved.model_config,
        vocab_size=smaller.vocab_size,
        tokenizer_fingerprint=smaller.fingerprint,
        type_separator=None if separator is None else smaller.eos_id,
        details={},
    )
    network, _ = get_bort_model(
        config.model, vocab=smaller, dropout=0.0, trainable=False, options=config.body_options
    )
    before, after = (net.collect_params().values() for net in (saved.network, network))
    for old, new in zip(before, after):
        value = old.data().asnumpy()
        new.set_data(nd.array(value if value.shape == new.shape else value[kept]))
    return network, config, smaller


if __name__ == "__main__":
    main()
