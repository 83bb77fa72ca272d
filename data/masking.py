"""Documents -> sequences -> masked sequences: pure functions of (arrays, random generator).

Text is one flat array of token ids and the lengths of its sentences; everything is done for many
sequences at once. A sequence is RoBERTa's (Liu et al. 2019, section 4.2, DOC-SENTENCES): `<s>`, as
many full sentences of one document as fit, `</s>`. Masking is BERT's (Devlin et al. 2019, section
3.1): 15 % of the tokens, of these 80 % become `<mask>`, 10 % another token, 10 % stay.
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


@dataclass(frozen=True)
class SequenceSettings:
    """How sentences are packed into sequences."""

    max_seq_length: int = option(
        512, "longest sequence in tokens, special tokens included", minimum=8, maximum=65535
    )
    short_seq_prob: float = option(
        0.1, "probability of a sequence cut short at random", minimum=0, maximum=1
    )
    format: str = option(
        FULL_SENTENCES,
        "<s> sentences </s>, or <s> sentences </s> the sentences that follow </s>",
        choices=(FULL_SENTENCES, SENTENCE_PAIRS),
    )

    @property
    def max_text_tokens(self) -> int:
        """Return how many tokens of text fit between the special tokens."""
        return self.max_seq_length - (3 if self.format == SENTENCE_PAIRS else 2)


@dataclass(frozen=True)
class MaskingSettings:
    """Which tokens are masked."""

    masked_lm_prob: float = option(0.15, "share of the tokens that is masked", maximum=1)
    max_predictions_per_seq: int = option(80, "most masked tokens in a sequence", minimum=1)
    whole_word_mask: bool = option(False, "mask all tokens of a word or none")

    def check(self) -> None:
        """Raise `UserError` unless something is masked."""
        if self.masked_lm_prob <= 0:
            raise UserError(f"--masked_lm_prob {self.masked_lm_prob}: must be above 0, e.g. 0.15")


class Text(NamedTuple):
    """Tokens of whole documents."""

    ids: np.ndarray  # [tokens], all sentences one after the other
    sentence_lengths: np.ndarray  # [sentences], in tokens
    document_lengths: np.ndarray  # [documents], in sentences


class Sequences(NamedTuple):
    """Token sequences with their special tokens, one after the other."""

    input_ids: np.ndarray  # [tokens]
    offsets: np.ndarray  # [sequences + 1]: where each begins and the last ends


class MaskedSequences(NamedTuple):
    """Masked sequences; the masked positions of one sequence ascend."""

    input_ids: np.ndarray  # [tokens], masks applied
    lengths: np.ndarray  # [sequences], in tokens
    masked_positions: np.ndarray  # [masked] uint16, inside each one's own sequence
    masked_ids: np.ndarray  # [masked], the true tokens there
    masked_lengths: np.ndarray  # [sequences], in masked tokens


class MaskingTable:
    """What masking has to know of a vocabulary, as arrays to look ids up in.

    Args:
        tokenizer: the vocabulary; its special tokens are never masked, nor put in at random.
        whole_words: mask words; otherwise each token counts as a word of its own.
    """

    def __init__(self, tokenizer: Tokenizer, whole_words: bool) -> None:
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id
        self.mask_id = tokenizer.mask_id
        self.maskable = np.ones(tokenizer.vocab_size, bool)
        self.maskable[tokenizer.special_ids] = False
        self.plain_ids = np.flatnonzero(self.maskable)
        self.starts_word = tokenizer.word_starts if whole_words else None


def make_sequences(
    text: Text, settings: SequenceSettings, table: MaskingTable, generator: np.random.Generator
) -> Sequences:
    """Pack the sentences of each document into sequences and add the special tokens.

    Every token of the text is in exactly one sequence. A sequence gets as many sentences as fit,
    with probability `short_seq_prob` within a random shorter length; a sentence that does not fit
    into a sequence of its own is split. In pairs, a sequence of one sentence has no second part.
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
    """Return where each sequence ends in the flat text, int64 [sequences]."""
    longest = settings.max_text_tokens
    # No more sequences than this: each ends with a sentence, or is full.
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
    """Return a random end of a sentence inside each sequence that has one."""
    starts = np.append(0, ends[:-1])
    first = np.searchsorted(sentence_ends, starts, side="right")
    inside = np.searchsorted(sentence_ends, ends, side="left") - first
    pick = first + (generator.random(len(ends)) * inside).astype(np.int64)
    return sentence_ends[pick[inside > 0]]


def _with_special_tokens(
    ids: np.ndarray, ends: np.ndarray, part_ends: np.ndarray, table: MaskingTable
) -> Sequences:
    """Put `<s>` before each sequence and `</s>` after each of its parts (all parts if one)."""
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

    A sequence of c tokens that are not special gets min(max_predictions_per_seq,
    max(1, round(masked_lm_prob * c))) of them masked. Whole words are taken in random order, those
    that would exceed this number are passed over; so it may be missed by a little.
    """
    input_ids, offsets = sequences
    maskable = table.maskable[input_ids]
    starts, lengths = _words(input_ids, maskable, table)
    counts = np.diff(offsets) - np.diff(np.searchsorted(np.flatnonzero(~maskable), offsets))
    wanted = np.rint(settings.masked_lm_prob * counts).astype(np.int64)
    wanted = np.clip(wanted, 1, settings.max_predictions_per_seq)
    taken = _choose_words(lengths, np.searchsorted(starts, offsets), wanted, generator)
    places = _ranges(starts[taken], lengths[taken])
    true_ids = input_ids[places]
    masked_lengths = np.diff(np.searchsorted(places, offsets))
    masked_input = input_ids.copy()
    masked_input[places] = _replacements(true_ids, table, generator)
    return MaskedSequences(
        input_ids=masked_input,
        lengths=np.diff(offsets),
        masked_positions=(places - np.repeat(offsets[:-1], masked_lengths)).astype(np.uint16),
        masked_ids=true_ids,
        masked_lengths=masked_lengths,
    )


def _words(
    input_ids: np.ndarray, maskable: np.ndarray, table: MaskingTable
) -> tuple[np.ndarray, np.ndarray]:
    """Return where each word starts and its length in tokens, both int64 [words]."""
    if table.starts_word is None:
        starts = np.flatnonzero(maskable)
        return starts, np.ones_like(starts)
    begins = table.starts_word[input_ids]
    # A special token begins something, and so does what follows it: the rest of a long sentence
    # may continue a word.
    special = np.flatnonzero(~maskable)
    begins[special] = True
    begins[special[:-1] + 1] = True  # the last token of all is a special one
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=len(input_ids))
    is_word = maskable[starts]
    return starts[is_word], lengths[is_word]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return start, start + 1, ..., start + length - 1 for each range, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def _choose_words(
    lengths: np.ndarray, offsets: np.ndarray, wanted: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Draw words in random order from each row until `wanted` tokens are taken.

    The shuffle of Fisher and Yates, stopped early, one draw at a time from all rows at once.

    `lengths` [words] are the tokens of each word, `offsets` [rows + 1] where the words of each row
    begin, `wanted` [rows] the tokens to take. Returns the numbers of the words taken, ascending.
    """
    order = np.arange(len(lengths))
    taken = np.zeros(len(lengths), bool)
    at, end, missing = offsets[:-1], offsets[1:], wanted
    while True:
        rows = (at < end) & (missing > 0)
        if not rows.all():
            at, end, missing = at[rows], end[rows], missing[rows]
        if not len(at):
            return np.flatnonzero(taken)
        drawn = at + (generator.random(len(at)) * (end - at)).astype(np.int64)
        word = order[drawn]
        order[drawn] = order[at]
        fits = lengths[word] <= missing
        taken[word[fits]] = True
        missing = missing - lengths[word] * fits
        at = at + 1


def _replacements(
    true_ids: np.ndarray, table: MaskingTable, generator: np.random.Generator
) -> np.ndarray:
    """Return what stands at the masked places: `<mask>`, a random token, or the true one."""
    fate = generator.random(len(true_ids))
    random_ids = table.plain_ids[generator.integers(len(table.plain_ids), size=len(true_ids))]
    replaced = np.where(fate < SHARE_MASK + SHARE_RANDOM, random_ids, true_ids)
    return np.where(fate < SHARE_MASK, table.mask_id, replaced)
