#!/usr/bin/env python3
"""Show the contents of a folder of pretraining shards: manifest, statistics, some sequences.

    python scripts/inspect_shards.py FOLDER [--num 3]

The tokenizer is the one in the folder, or the one that the tokenizer flags name.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Iterator, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.config import build, option, parser_for
from bort.errors import UserError, entry_point
from bort.tokenization import (
    TOKENIZER_FOLDER,
    Tokenizer,
    TokenizerSettings,
    load_tokenizer,
    load_tokenizer_folder,
)
from data.shards import Manifest, Shard, ShardSet, open_shards

# isort: split
import numpy as np  # after bort: a Ctrl-C during the import is then one line

_SEQUENCES_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class InspectSettings:
    """Output."""

    num: int = option(
        3, "number of sequences to print, spread over the folder", minimum=0, maximum=1_000_000
    )


@dataclass
class Statistics:
    """Counts over all sequences of a folder."""

    text_tokens: int = 0
    masked: int = 0
    masked_special: int = 0
    became_mask: int = 0
    became_other: int = 0

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield (name, value) for the table."""
        yield "masked, of tokens of text", _percent(self.masked, self.text_tokens)
        yield "  became <mask>", _percent(self.became_mask, self.masked)
        yield "  became another token", _percent(self.became_other, self.masked)
        kept = self.masked - self.became_mask - self.became_other
        yield "  stayed", _percent(kept, self.masked)
        yield "masked special tokens", f"{self.masked_special:,}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.2f} %"


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> Statistics:
    """Print the report on one folder and return its statistics."""
    parser = parser_for(str(__doc__), InspectSettings, TokenizerSettings)
    parser.add_argument("folder", help="made by create_pretraining_data.py")
    parsed = vars(parser.parse_args(argv))
    settings = build(InspectSettings, parsed)
    shards = open_shards(parsed["folder"], remember=False)
    tokenizer = _tokenizer_of(parsed["folder"], shards.manifest, build(TokenizerSettings, parsed))
    statistics = measure(shards, tokenizer)
    for what, value in [*_manifest_rows(shards), *statistics.rows()]:
        print(f"{what:<28}{value:>16}")
    places = np.linspace(0, shards.num_sequences - 1, settings.num).astype(int)
    for index in np.unique(places):  # once each, where there are fewer
        print(f"\nsequence {index}, {shards.lengths[index]} tokens")
        print(in_words(tokenizer, *shards.sequence(int(index))))
    return statistics


def _tokenizer_of(folder: str, manifest: Manifest, given: TokenizerSettings) -> Tokenizer:
    tokenizer = None
    if given == TokenizerSettings():
        tokenizer = load_tokenizer_folder(os.path.join(folder, TOKENIZER_FOLDER))
        given = build(TokenizerSettings, dict(manifest.tokenizer.settings))
    if tokenizer is None:
        tokenizer = load_tokenizer(given)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(
            f"{folder}: its shards were made with another vocabulary; name it by --dataset_name, "
            "--vocab_file and --bpe_ranks, or --sentencepiece"
        )
    return tokenizer


def _manifest_rows(shards: ShardSet) -> Iterator[tuple[str, str]]:
    manifest, lengths = shards.manifest, shards.lengths
    yield "tokenizer", manifest.tokenizer.name
    yield "vocabulary", f"{manifest.vocab_size:,}"
    for name, value in manifest.arguments.items():
        yield f"--{name}", str(value)
    yield "input files", f"{len(manifest.inputs):,}"
    yield "shards (SHA-256 verified)", f"{len(manifest.shards):,}"
    for name, count in manifest.totals.items():
        yield name, f"{count:,}"
    yield "unknown, of all tokens", _percent(manifest.totals["unknown"], lengths.sum())
    shortest, median, longest = np.percentile(lengths, [0, 50, 100])
    yield "length, shortest", f"{shortest:.0f}"
    yield "length, median", f"{median:.0f}"
    yield "length, longest", f"{longest:.0f}"


def measure(shards: ShardSet, tokenizer: Tokenizer) -> Statistics:
    """Count masks and replacements; reads all shards, a part at a time."""
    total = Statistics()
    special = np.zeros(tokenizer.vocab_size, bool)
    special[tokenizer.special_ids] = True
    for shard in shards.shards:
        for first in range(0, shard.num_sequences, _SEQUENCES_AT_ONCE):
            last = min(first + _SEQUENCES_AT_ONCE, shard.num_sequences)
            shown, original_ids, input_ids = _masked_tokens(shard, first, last)
            total.masked += len(original_ids)
            total.masked_special += int(special[original_ids].sum())
            total.became_mask += int((shown == tokenizer.mask_id).sum())
            total.became_other += int(
                ((shown != tokenizer.mask_id) & (shown != original_ids)).sum()
            )
            # Special tokens at masked positions stand for the original ones, which are counted.
            specials = special[input_ids].sum() - special[shown].sum() + special[original_ids].sum()
            total.text_tokens += len(input_ids) - int(specials)
    return total


def _masked_tokens(shard: Shard, first: int, last: int) -> tuple[np.ndarray, ...]:
    """Return the ids at the masked positions, the original ids there, and all input ids."""
    offsets = shard.offsets[first : last + 1]
    masked_offsets = shard.masked_offsets[first : last + 1]
    masked = slice(masked_offsets[0], masked_offsets[-1])
    input_ids = shard.input_ids[offsets[0] : offsets[-1]]
    starts = np.repeat(offsets[:-1] - offsets[0], np.diff(masked_offsets))
    return (
        input_ids[starts + shard.masked_positions[masked]],
        shard.masked_ids[masked],
        input_ids,
    )


def in_words(
    tokenizer: Tokenizer, input_ids: np.ndarray, positions: np.ndarray, original_ids: np.ndarray
) -> str:
    """Return a sequence as text; a masked token reads [original: replacement]."""
    original = dict(zip(positions.tolist(), original_ids.tolist()))
    special = set(tokenizer.special_ids.tolist())
    ids = input_ids.tolist()

    def group(position: int) -> int:
        # A masked or special token is a group of its own, the others are decoded together.
        return position if position in original or ids[position] in special else -1

    words = []
    for key, positions_of_group in groupby(range(len(ids)), key=group):
        shown = [ids[position] for position in positions_of_group]
        if key not in original:
            words.append(_text_of(tokenizer, shown))
            continue
        word = _text_of(tokenizer, [original[key]])
        space = " " * word.startswith(" ")
        replacement = "kept" if shown == [original[key]] else _text_of(tokenizer, shown).strip()
        words.append(f"{space}[{word.strip()}: {replacement}]")
    return "".join(words)


def _text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    if ids[0] in tokenizer.special_ids:
        return " ".join(tokenizer.tokens(ids))
    text = tokenizer.decode(ids)
    # SentencePiece drops the space before the first word.
    missing = tokenizer.word_starts[ids[0]] and not text.startswith(" ")
    return " " * bool(missing) + text


if __name__ == "__main__":
    main()
