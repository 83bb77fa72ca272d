"""Documents to sequences to masked sequences: pure functions of arrays and a random generator.

Text is one flat array of token ids and the lengths of its sentences; many sequences are processed
at once. A sequence is RoBERTa's DOC-SENTENCES (Liu et al. 2019, section 4.2): `<s>`, as many full
sentences of one document as fit, `</s>`. Masking is BERT's (Devlin et al. 2019, section 3.1): 15 %
of the tokens, of which 80 % become `<mask>`, 10 % a random token, and 10 % are kept.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bort.config import option
from bort.errors import UserError
from bort.tokenization import Tokenizer

FULL_SENTENCES = "full_sentences"
SENTENCE_PAIRS = "sentence_pairs"
SHARE_MASK = 0.8
SHARE_RANDOM = 0.1
_SPACES = frozenset("▁Ġ")  # how SentencePiece and byte-level BPE spell a space alone


@dataclass(frozen=True)
class SequenceSettings:
    """Packing of sentences into sequences."""

    max_seq_length: int = option(
        512,
        "longest sequence in tokens, special tokens included; at most the positions of the model "
        "to train (Bort: 512)",
        minimum=8,
        maximum=65535,
    )
    short_seq_prob: float = option(
        0.1, "probability of a sequence of random shorter length", minimum=0, maximum=1
    )
    format: str = option(
        FULL_SENTENCES,
        "full_sentences: <s> sentences of one document </s>, which RoBERTa's paper calls "
        "DOC-SENTENCES (its FULL-SENTENCES, which cross documents, are not offered); "
        "sentence_pairs: <s> sentences </s> the sentences that follow </s>",
        choices=(FULL_SENTENCES, SENTENCE_PAIRS),
    )

    @property
    def max_text_tokens(self) -> int:
        """Return how many tokens of text fit between the special tokens."""
        return self.max_seq_length - (3 if self.format == SENTENCE_PAIRS else 2)


@dataclass(frozen=True)
class MaskingSettings:
    """Masking."""

    masked_lm_prob: float = option(0.15, "share of the tokens to mask", maximum=1)
    max_predictions_per_seq: int = option(
        80, "maximum number of masked tokens in a sequence", minimum=1
    )
    whole_word_mask: bool = option(False, "mask all tokens of a word or none of them")

    def check(self) -> None:
        """Raise `UserError` unless the share of masked tokens is positive."""
        if self.masked_lm_prob <= 0:
            raise UserError(f"--masked_lm_prob {self.masked_lm_prob}: must be above 0, e.g. 0.15")


class Text(NamedTuple):
    """Tokens of whole documents."""

    ids: np.ndarray  # [tokens], all sentences concatenated
    sentence_lengths: np.ndarray  # [sentences], in tokens
    document_lengths: np.ndarray  # [documents], in sentences


class Sequences(NamedTuple):
    """Token sequences with their special tokens, concatenated."""

    input_ids: np.ndarray  # [tokens]
    offsets: np.ndarray  # [sequences + 1]: sequence i is input_ids[offsets[i]:offsets[i + 1]]


class MaskedSequences(NamedTuple):
    """Masked sequences; the masked positions of one sequence ascend."""

    input_ids: np.ndarray  # [tokens], masks applied
    lengths: np.ndarray  # [sequences], in tokens
    masked_positions: np.ndarray  # [masked] uint16, relative to the start of the sequence
    masked_ids: np.ndarray  # [masked], the original tokens there
    masked_lengths: np.ndarray  # [sequences], in masked tokens


class MaskingTable:
    """The properties of a vocabulary that masking needs, as arrays indexed by token id.

    Args:
        tokenizer: the vocabulary; its special tokens are never masked and never replace a token.
        whole_words: mask words; otherwise each token counts as a word.
    """

    def __init__(self, tokenizer: Tokenizer, whole_words: bool) -> None:
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id
        self.mask_id = tokenizer.mask_id
        self.maskable = np.ones(tokenizer.vocab_size, bool)
        self.maskable[tokenizer.special_ids] = False
        self.plain_ids = np.flatnonzero(self.maskable)
        self.starts_word = tokenizer.word_starts if whole_words else None


def require_words(tokenizer: Tokenizer) -> None:
    """Raise `UserError` for a vocabulary whose tokens do not say where words begin.

    As that of a SentencePiece model which marks their ends: a sentence would be one word.
    """
    begin = set(tokenizer.tokens(np.flatnonzero(tokenizer.word_starts).tolist()))
    if begin <= _SPACES.union(tokenizer.special_tokens.values()):
        raise UserError(
            "--whole_word_mask: no token of this vocabulary begins a word, so that nothing says "
            "what is one; leave it out"
        )


def make_sequences(
    text: Text, settings: SequenceSettings, table: MaskingTable, generator: np.random.Generator
) -> Sequences:
    """Pack the sentences of each document into sequences and add the special tokens.

    Every token of the text is in exactly one sequence. A sequence gets as many sentences as fit
    into the maximum length, with probability `short_seq_prob` into a random shorter one. A
    sentence longer than a whole sequence is split. In the format of pairs, a sequence of one
    sentence has no second part.
    """
    sentence_ends = np.cumsum(text.sentence_lengths)
    document_ends = np.append(0, sentence_ends)[np.cumsum(text.document_lengths)]
    ends = _pack(sentence_ends.tolist(), document_ends.tolist(), settings, generator)
    if settings.format == SENTENCE_PAIRS:
        part_ends = np.union1d(ends, _middles(ends, sentence_ends, generator))
    else:
        part_ends = ends
    return _with_special_tokens(text.ids, ends, part_ends, table)


def _pack(
    sentence_ends: list[int],
    document_ends: list[int],
    settings: SequenceSettings,
    generator: np.random.Generator,
) -> np.ndarray:
    """Return the end of each sequence in the flat text, int64 [sequences]."""
    longest = settings.max_text_tokens
    # An upper bound of the number of sequences: each ends with a sentence, or is full.
    most = len(sentence_ends) + (sentence_ends[-1] // longest if sentence_ends else 0)
    limits = generator.integers(2, longest, size=most, endpoint=True)
    limits[generator.random(most) >= settings.short_seq_prob] = longest
    ends: list[int] = []
    start, remaining = 0, iter(limits.tolist())
    for document_end in document_ends:
        while start < document_end:
            limit = start + next(remaining)
            next_sentence = bisect_right(sentence_ends, limit)
            end = sentence_ends[next_sentence - 1] if next_sentence else 0
            if end <= start:
                end = min(sentence_ends[next_sentence], start + longest)
            start = min(end, document_end)
            ends.append(start)
    return np.array(ends, np.int64)


def _middles(
    ends: np.ndarray, sentence_ends: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Return the end of a random sentence inside each sequence that has several."""
    starts = np.append(0, ends[:-1])
    first = np.searchsorted(sentence_ends, starts, side="right")
    inside = np.searchsorted(sentence_ends, ends, side="left") - first
    pick = first + (generator.random(len(ends)) * inside).astype(np.int64)
    return sentence_ends[pick[inside > 0]]


def _with_special_tokens(
    ids: np.ndarray, ends: np.ndarray, part_ends: np.ndarray, table: MaskingTable
) -> Sequences:
    """Put `<s>` before each sequence and `</s>` after each of its one or two parts."""
    part_lengths = np.diff(part_ends, prepend=0)
    parts_before = np.append(0, np.searchsorted(part_ends, ends, side="right"))
    sequence_of_part = np.repeat(np.arange(len(ends)), np.diff(parts_before))
    special_before = sequence_of_part + 1 + np.arange(len(part_ends))
    offsets = np.append(0, ends) + np.arange(len(ends) + 1) + parts_before
    input_ids = np.full(offsets[-1], table.eos_id, ids.dtype)
    input_ids[np.arange(len(ids)) + np.repeat(special_before, part_lengths)] = ids
    input_ids[offsets[:-1]] = table.bos_id
    return Sequences(input_ids, offsets)


def mask_sequences(
    sequences: Sequences,
    settings: MaskingSettings,
    table: MaskingTable,
    generator: np.random.Generator,
) -> MaskedSequences:
    """Mask tokens, or whole words, of each sequence at random.

    A sequence of c tokens that are not special gets n = min(max_predictions_per_seq,
    max(1, round(masked_lm_prob * c))) of them masked; without such a token, none. Whole words are
    drawn in random order, and those that would exceed n are skipped, so that a sequence may have
    slightly fewer masks. Where every word exceeds n, single tokens are masked.
    """
    input_ids, offsets = sequences
    maskable = table.maskable[input_ids]
    starts, lengths = _words(input_ids, maskable, table)
    counts = np.diff(offsets) - np.diff(np.searchsorted(np.flatnonzero(~maskable), offsets))
    budget = np.rint(settings.masked_lm_prob * counts).astype(np.int64)
    budget = np.clip(budget, 1, settings.max_predictions_per_seq)
    chosen = _choose_words(lengths, np.searchsorted(starts, offsets), budget, generator)
    masked = _ranges(starts[chosen], lengths[chosen])  # indices into input_ids, ascending
    masked_input = input_ids.copy()
    masked_input[masked] = _replacements(input_ids[masked], table, generator)
    if table.starts_word is not None:
        # Last, so that all other sequences have the masks that earlier versions gave them.
        single = _tokens_of_long_words(masked, offsets, maskable, budget, generator)
        masked_input[single] = _replacements(input_ids[single], table, generator)
        masked = np.union1d(masked, single)
    masked_lengths = np.diff(np.searchsorted(masked, offsets))
    return MaskedSequences(
        input_ids=masked_input,
        lengths=np.diff(offsets),
        masked_positions=(masked - np.repeat(offsets[:-1], masked_lengths)).astype(np.uint16),
        masked_ids=input_ids[masked],
        masked_lengths=masked_lengths,
    )


def _tokens_of_long_words(
    masked: np.ndarray,
    offsets: np.ndarray,
    maskable: np.ndarray,
    budget: np.ndarray,
    generator: np.random.Generator,
) -> np.ndarray:
    """Draw single tokens of the sequences in which every word exceeds the budget.

    Text without spaces and long URLs are such words. `masked` are the indices of masked tokens,
    ascending, `budget` [sequences] counts tokens. Returns the indices of the drawn tokens.
    """
    none_masked = np.diff(np.searchsorted(masked, offsets)) == 0  # [sequences]
    in_such_sequence = np.repeat(none_masked, np.diff(offsets))  # [tokens]
    tokens = np.flatnonzero(maskable & in_such_sequence)
    single = np.ones(len(tokens), np.int64)
    chosen = _choose_words(single, np.searchsorted(tokens, offsets), budget, generator)
    return tokens[chosen]


def _words(
    input_ids: np.ndarray, maskable: np.ndarray, table: MaskingTable
) -> tuple[np.ndarray, np.ndarray]:
    """Return the start of each word and its length in tokens, both int64 [words]."""
    if table.starts_word is None:
        starts = np.flatnonzero(maskable)
        return starts, np.ones_like(starts)
    begins = table.starts_word[input_ids]
    # A word ends at a special token. The token after one starts a word even if its spelling does
    # not: a sequence may begin within a word of a sentence that was split.
    special = np.flatnonzero(~maskable)
    begins[special] = True
    begins[special[:-1] + 1] = True  # the very last token is a special one
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=len(input_ids))
    is_word = maskable[starts]
    return starts[is_word], lengths[is_word]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return start, start + 1, ..., start + length - 1 of each range, concatenated."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def _choose_words(
    lengths: np.ndarray, offsets: np.ndarray, budget: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Draw words of each sequence in random order until `budget` tokens are chosen.

    A Fisher-Yates shuffle that stops early, with one draw at a time from all sequences together.

    `lengths` [words] are the tokens of each word, `offsets` [sequences + 1] the bounds of the words
    of each sequence, `budget` [sequences] the tokens to choose. Returns the indices of the chosen
    words, ascending.
    """
    order = np.arange(len(lengths))
    chosen = np.zeros(len(lengths), bool)
    # Of the sequences that still need words: the next draw, the end of the words, missing tokens.
    at, end, missing = offsets[:-1], offsets[1:], budget
    while True:
        unfinished = (at < end) & (missing > 0)
        if not unfinished.all():
            at, end, missing = at[unfinished], end[unfinished], missing[unfinished]
        if not len(at):
            return np.flatnonzero(chosen)
        drawn = at + (generator.random(len(at)) * (end - at)).astype(np.int64)
        word = order[drawn]
        order[drawn] = order[at]
        fits = lengths[word] <= missing
        chosen[word[fits]] = True
        missing = missing - lengths[word] * fits
        at = at + 1


def _replacements(
    original_ids: np.ndarray, table: MaskingTable, generator: np.random.Generator
) -> np.ndarray:
    """Return the ids at masked positions: `<mask>`, a random token, or the original one."""
    draw = generator.random(len(original_ids))
    random_ids = table.plain_ids[generator.integers(len(table.plain_ids), size=len(original_ids))]
    replaced = np.where(draw < SHARE_MASK + SHARE_RANDOM, random_ids, original_ids)
    return np.where(draw < SHARE_MASK, table.mask_id, replaced)


class DynamicMasking:
    """Draws new masks for the sequences of shards in each epoch (Liu et al. 2019, section 4.1).

    The masks are a pure function of (seed, epoch, sequence): they depend neither on batches and
    ranks nor on interruptions.

    Args:
        settings: share and number of masks, as for `mask_sequences`.
        table: the vocabulary of the shards.
        seed: of the run.
    """

    def __init__(self, settings: MaskingSettings, table: MaskingTable, seed: int) -> None:
        self._settings = settings
        self._table = table
        self._seed = seed

    def __call__(
        self,
        input_ids: np.ndarray,
        masked_positions: np.ndarray,
        masked_ids: np.ndarray,
        epoch: int,
        index: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (input_ids, masked_positions, masked_ids) of sequence `index` in an epoch."""
        original = unmask(input_ids, masked_positions, masked_ids)
        generator = np.random.default_rng([self._seed, epoch, index])
        sequences = Sequences(original, np.array([0, len(original)]))
        made = mask_sequences(sequences, self._settings, self._table, generator)
        return made.input_ids, made.masked_positions, made.masked_ids


def unmask(
    input_ids: np.ndarray, masked_positions: np.ndarray, masked_ids: np.ndarray
) -> np.ndarray:
    """Return the original ids [tokens] of a masked sequence."""
    original = np.array(input_ids)
    original[masked_positions] = masked_ids
    return original
