"""Packing sentences into sequences and masking them, against plain references and statistics."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest

from bort.config import build
from bort.errors import UserError
from data.masking import (
    FULL_SENTENCES,
    SENTENCE_PAIRS,
    DynamicMasking,
    MaskingSettings,
    MaskingTable,
    Sequences,
    SequenceSettings,
    Text,
    make_sequences,
    mask_sequences,
    unmask,
)

VOCAB_SIZE = 1000
BOS, PAD, EOS, UNK, MASK = 0, 1, 2, 3, 999
SPECIAL = [BOS, PAD, EOS, UNK, MASK]
# A third of the plain tokens begin a word; so do the special ones, as `Tokenizer` says.
WORD_STARTS = np.array([i in SPECIAL or i % 3 == 0 for i in range(VOCAB_SIZE)])


def table(whole_words=False):
    vocabulary = SimpleNamespace(
        bos_id=BOS,
        eos_id=EOS,
        mask_id=MASK,
        vocab_size=VOCAB_SIZE,
        special_ids=np.array(SPECIAL),
        word_starts=WORD_STARTS,
    )
    return MaskingTable(vocabulary, whole_words)


def make_text(documents, seed=0):
    """Return a text of documents given as lists of sentence lengths, with random plain tokens."""
    sentences = [length for document in documents for length in document]
    ids = np.random.default_rng(seed).integers(4, MASK, sum(sentences)).astype(np.uint16)
    return Text(ids, np.array(sentences, np.int64), np.array(list(map(len, documents)), int))


def random_text(seed, documents=40):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 30, documents)
    return make_text([generator.integers(1, 40, size).tolist() for size in sizes], seed)


def sequences_of(text, seed=0, **settings):
    made = make_sequences(text, SequenceSettings(**settings), table(), np.random.default_rng(seed))
    return [
        made.input_ids[start:end].tolist() for start, end in zip(made.offsets, made.offsets[1:])
    ]


def text_of(sequence):
    return [token for token in sequence if token not in (BOS, EOS)]


def greedily_packed(text, longest):
    """Pack document by document, sentence by sentence: the definition, in plain Python."""
    ids, lengths, sequences = text.ids.tolist(), iter(text.sentence_lengths.tolist()), []
    for count in text.document_lengths.tolist():
        sequence = []
        for _ in range(count):
            length = next(lengths)
            sentence, ids = ids[:length], ids[length:]
            if len(sequence) + len(sentence) > longest and sequence:
                sequences.append(sequence)
                sequence = []
            while len(sentence) > longest:
                sequences.append(sentence[:longest])
                sentence = sentence[longest:]
            sequence = sequence + sentence
        if sequence:
            sequences.append(sequence)
    return [[BOS, *sequence, EOS] for sequence in sequences]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("longest", [8, 30, 64, 512])
def test_full_sentences_are_packed_greedily(seed, longest):
    text = random_text(seed)
    sequences = sequences_of(text, max_seq_length=longest, short_seq_prob=0.0)
    assert sequences == greedily_packed(text, longest - 2)


@pytest.mark.parametrize("kind", [FULL_SENTENCES, SENTENCE_PAIRS])
@pytest.mark.parametrize("short", [0.0, 0.1, 1.0])
def test_every_token_is_in_one_sequence_and_none_is_too_long(kind, short):
    text = random_text(3)
    sequences = sequences_of(text, max_seq_length=50, short_seq_prob=short, format=kind)
    assert [token for one in sequences for token in text_of(one)] == text.ids.tolist()
    assert max(map(len, sequences)) <= 50
    assert all(one[0] == BOS and one[-1] == EOS for one in sequences)


@pytest.mark.parametrize("kind", [FULL_SENTENCES, SENTENCE_PAIRS])
def test_no_sequence_joins_two_documents(kind):
    documents = [[7] * 3] * 50
    text = make_text(documents)
    sequences = sequences_of(text, short_seq_prob=0.5, format=kind)
    ends = np.cumsum([len(text_of(one)) for one in sequences])
    assert set(range(21, 21 * 50 + 1, 21)) <= set(ends.tolist())


def test_sentences_stay_whole_where_they_fit():
    text = random_text(4)
    sequences = sequences_of(text, max_seq_length=42, short_seq_prob=0.7)
    ends = np.cumsum([len(text_of(one)) for one in sequences])
    assert set(ends.tolist()) <= set(np.cumsum(text.sentence_lengths).tolist())


def test_a_long_sentence_is_split_not_cut():
    text = make_text([[3, 25, 4]])
    sequences = sequences_of(text, max_seq_length=12, short_seq_prob=0.0)
    assert [len(text_of(one)) for one in sequences] == [3, 10, 10, 9]
    assert sequences == greedily_packed(text, 10)


def test_short_sequences_come_as_often_as_asked():
    text = make_text([[1] * 200_000])
    lengths = np.array([len(text_of(one)) for one in sequences_of(text, short_seq_prob=0.3)])
    short = np.sum(lengths[:-1] < 510)
    # Of the short limits 2..510, one in 509 is no shorter than the others.
    expected, count = 0.3 * 508 / 509, len(lengths) - 1
    assert abs(short / count - expected) < 4 * np.sqrt(0.3 * 0.7 / count)
    assert lengths.min() >= 1
    assert lengths.max() == 510


def test_a_short_limit_is_no_reason_to_split_a_sentence():
    text = make_text([[100] * 50])
    assert {len(text_of(one)) for one in sequences_of(text, short_seq_prob=1.0)} <= {
        100, 200, 300, 400, 500
    }  # fmt: skip


def test_copies_differ_in_the_boundaries_of_sequences():
    text = make_text([[9] * 2000])
    first, second = (sequences_of(text, seed=seed) for seed in (0, 1))
    assert first != second
    assert first == sequences_of(text, seed=0)


def test_empty_sentences_and_documents_make_nothing():
    text = make_text([[0, 0], [], [5, 0, 3], [0]])
    assert sequences_of(text) == [[BOS, *text.ids.tolist(), EOS]]
    assert sequences_of(make_text([[0]])) == []
    assert sequences_of(make_text([])) == []


def test_pairs_are_consecutive_sentences_of_one_document():
    text = random_text(5)
    ends = np.cumsum(text.sentence_lengths).tolist()
    sequences = sequences_of(text, max_seq_length=80, short_seq_prob=0.0, format=SENTENCE_PAIRS)
    position, pairs = 0, 0
    for sequence in sequences:
        *middle, last = np.flatnonzero(np.array(sequence) == EOS).tolist()
        assert last == len(sequence) - 1
        inside = [end for end in ends if position < end < position + len(text_of(sequence))]
        # A pair wherever two sentences are together, separated at the end of one of them.
        assert len(middle) == bool(inside)
        assert all(position + place - 1 in inside for place in middle)
        pairs += len(middle)
        position += len(text_of(sequence))
    assert pairs > 30


def test_pairs_may_be_split_anywhere():
    text = make_text([[10] * 4] * 3000)
    sequences = sequences_of(text, short_seq_prob=0.0, format=SENTENCE_PAIRS)
    middles = [sequence.index(EOS) - 1 for sequence in sequences]
    counts = np.bincount(middles)[[10, 20, 30]]
    assert counts.sum() == 3000
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(3000 * 2 / 9)


def random_sequences(seed, count=400, longest=512):
    """Return sequences of random length, now and then with <unk> in them."""
    generator = np.random.default_rng(seed)
    rows = []
    for length in generator.integers(1, longest - 1, count):
        row = generator.integers(4, MASK, length)
        row[generator.random(length) < 0.02] = UNK
        rows.append([BOS, *row, EOS])
    offsets = np.cumsum([0, *map(len, rows)])
    return Sequences(np.concatenate(rows).astype(np.uint16), offsets)


def masked(sequences, seed=0, whole_words=False, **settings):
    return mask_sequences(
        sequences,
        MaskingSettings(whole_word_mask=whole_words, **settings),
        table(whole_words),
        np.random.default_rng(seed),
    )


def places_of(sequences, result):
    """Return the masked places in the flat array, one row after the other."""
    starts = np.repeat(sequences.offsets[:-1], result.masked_lengths)
    return starts + result.masked_positions


@pytest.mark.parametrize("whole_words", [False, True])
def test_unmasking_restores_the_text(whole_words):
    sequences = random_sequences(0)
    result = masked(sequences, whole_words=whole_words)
    restored = result.input_ids.copy()
    restored[places_of(sequences, result)] = result.masked_ids
    assert (restored == sequences.input_ids).all()
    assert (result.lengths == np.diff(sequences.offsets)).all()
    assert result.masked_lengths.sum() == len(result.masked_ids) == len(result.masked_positions)
    assert result.input_ids.dtype == sequences.input_ids.dtype


@pytest.mark.parametrize("whole_words", [False, True])
def test_special_tokens_are_never_masked_nor_put_in(whole_words):
    sequences = random_sequences(1)
    result = masked(sequences, whole_words=whole_words)
    assert not np.isin(result.masked_ids, SPECIAL).any()
    shown = result.input_ids[places_of(sequences, result)]
    assert not np.isin(shown, [BOS, PAD, EOS, UNK]).any()


@pytest.mark.parametrize("whole_words", [False, True])
def test_positions_ascend_and_differ(whole_words):
    sequences = random_sequences(2)
    places = places_of(sequences, masked(sequences, whole_words=whole_words))
    assert (np.diff(places) > 0).all()


@pytest.mark.parametrize(("share", "most"), [(0.15, 80), (0.15, 20), (0.4, 80), (0.001, 80)])
def test_number_of_masks(share, most):
    sequences = random_sequences(3)
    result = masked(sequences, masked_lm_prob=share, max_predictions_per_seq=most)
    for start, end, count in zip(
        sequences.offsets, sequences.offsets[1:], result.masked_lengths.tolist()
    ):
        candidates = sum(token not in SPECIAL for token in sequences.input_ids[start:end].tolist())
        assert count == min(most, max(1, round(share * candidates)), candidates)


def test_a_sequence_of_unknown_tokens_has_no_masks():
    sequences = Sequences(np.array([BOS, UNK, UNK, EOS, BOS, 7, EOS]), np.array([0, 4, 7]))
    result = masked(sequences)
    assert result.masked_lengths.tolist() == [0, 1]
    assert result.masked_positions.tolist() == [1]


@pytest.mark.parametrize("whole_words", [False, True])
def test_no_sequences_give_no_masks(whole_words):
    result = masked(Sequences(np.zeros(0, np.uint16), np.zeros(1, int)), whole_words=whole_words)
    assert [len(array) for array in result] == [0] * 5


def test_everything_may_be_masked():
    sequences = random_sequences(4, longest=60)
    result = masked(sequences, masked_lm_prob=1.0)
    assert len(result.masked_ids) == (~np.isin(sequences.input_ids, SPECIAL)).sum()


@pytest.mark.parametrize("whole_words", [False, True])
def test_eight_of_ten_become_mask_one_another_token_one_stays(whole_words):
    sequences = random_sequences(5, count=1500)
    result = masked(sequences, whole_words=whole_words)
    shown, true_ids = result.input_ids[places_of(sequences, result)], result.masked_ids
    count = len(true_ids)
    plain = VOCAB_SIZE - len(SPECIAL)
    for share, found in [
        (0.8, shown == MASK),
        (0.1 * (plain - 1) / plain, (shown != MASK) & (shown != true_ids)),
        (0.1 + 0.1 / plain, shown == true_ids),
    ]:
        assert abs(found.sum() / count - share) < 4 * np.sqrt(share * (1 - share) / count)


def test_random_tokens_are_uniform_over_the_plain_ones():
    sequences = random_sequences(6, count=3000)
    result = masked(sequences)
    shown = result.input_ids[places_of(sequences, result)]
    counts = np.bincount(
        shown[(shown != MASK) & (shown != result.masked_ids)], minlength=VOCAB_SIZE
    )
    counts = np.delete(counts, SPECIAL)
    expected = counts.mean()
    # Chi-square of 994 degrees of freedom: mean 994, standard deviation sqrt(2 * 994).
    assert abs(((counts - expected) ** 2 / expected).sum() - 994) < 4 * np.sqrt(2 * 994)


@pytest.mark.parametrize("length", [10, 100])
def test_every_position_is_masked_equally_often(length):
    rows = 20_000
    one = np.array([BOS, *range(5, 5 + length), EOS])
    sequences = Sequences(np.tile(one, rows), np.arange(rows + 1) * len(one))
    result = masked(sequences)
    counts = np.bincount(result.masked_positions, minlength=length + 2)[1:-1]
    share = round(0.15 * length) / length
    assert np.abs(counts / rows - share).max() < 4.5 * np.sqrt(share * (1 - share) / rows)


def test_pairs_of_positions_are_masked_equally_often():
    rows, length = 30_000, 6
    one = np.array([BOS, *range(5, 5 + length), EOS])
    sequences = Sequences(np.tile(one, rows), np.arange(rows + 1) * len(one))
    result = masked(sequences, masked_lm_prob=2 / 6)
    first, second = result.masked_positions.reshape(rows, 2).T
    counts = np.bincount(first * 8 + second)
    counts = counts[counts > 0]
    assert len(counts) == 15
    assert np.abs(counts / rows - 1 / 15).max() < 4.5 * np.sqrt(1 / 15 / rows)


def test_masks_are_a_function_of_the_generator():
    sequences = random_sequences(7)
    first, again, other = masked(sequences, 1), masked(sequences, 1), masked(sequences, 2)
    for one, two in zip(first, again):
        assert (one == two).all()
    assert (first.input_ids != other.input_ids).any()


def words_of(row):
    """Return the words of one sequence as lists of places: the definition, in plain Python."""
    words, inside = [], False
    for place, token in enumerate(row):
        if token in SPECIAL:
            inside = False
        elif WORD_STARTS[token] or not inside:
            words.append([place])
            inside = True
        else:
            words[-1].append(place)
    return words


def test_whole_words_are_masked_whole():
    sequences = random_sequences(8)
    result = masked(sequences, whole_words=True)
    rows = np.split(sequences.input_ids, sequences.offsets[1:-1])
    ends = np.cumsum(result.masked_lengths)[:-1]
    missing = 0
    for row, positions in zip(rows, np.split(result.masked_positions, ends)):
        chosen = set(positions.tolist())
        words = words_of(row.tolist())
        wanted = min(80, max(1, round(0.15 * sum(map(len, words)))))
        if words and min(map(len, words)) > wanted:
            assert len(chosen) == wanted, "single tokens where no word fits"
            continue
        assert all(chosen >= set(word) or not chosen & set(word) for word in words)
        left = [len(word) for word in words if not chosen & set(word)]
        # Not more than wanted; fewer only where no further word fits.
        assert len(chosen) <= wanted
        assert len(chosen) == wanted or min(left, default=99) > wanted - len(chosen)
        missing += len(chosen) < wanted
    assert missing < 40


def test_the_rest_of_a_split_word_is_a_word():
    # 7 and 8 continue a word, but here nothing stands before them.
    sequences = Sequences(np.array([BOS, 7, 8, EOS, BOS, 7, EOS]), np.array([0, 4, 7]))
    result = masked(sequences, whole_words=True, masked_lm_prob=1.0)
    assert result.masked_positions.tolist() == [1, 2, 1]


def test_where_no_word_fits_single_tokens_are_masked():
    # One word of 100 tokens, as a URL or Chinese text is, between sequences of short words.
    long = np.full(100, 7)
    rows = [[BOS, 9, 12, EOS], [BOS, *long, EOS], [BOS, UNK, EOS], [BOS, *long, UNK, *long, EOS]]
    sequences = Sequences(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))
    result = masked(sequences, whole_words=True)
    assert result.masked_lengths.tolist() == [1, 15, 0, 30]
    indices = places_of(sequences, result)
    assert (np.diff(indices) > 0).all()
    assert (sequences.input_ids[indices] == result.masked_ids).all()
    # Over many draws every token of the word is masked equally often.
    rows = 4000
    row = np.array([BOS, *np.full(10, 7), EOS])
    sequences = Sequences(np.tile(row, rows), np.arange(rows + 1) * len(row))
    result = masked(sequences, whole_words=True, masked_lm_prob=0.2)
    assert (result.masked_lengths == 2).all()
    counts = np.bincount(result.masked_positions, minlength=12)[1:-1]
    assert np.abs(counts / rows - 0.2).max() < 4.5 * np.sqrt(0.2 * 0.8 / rows)


@pytest.mark.parametrize("whole_words", [False, True])
def test_every_sequence_with_text_has_a_mask(whole_words):
    sequences = random_sequences(9, count=3000, longest=20)
    result = masked(sequences, whole_words=whole_words)
    rows = np.split(sequences.input_ids, sequences.offsets[1:-1])
    has_text = np.array([not np.isin(row, SPECIAL).all() for row in rows])
    assert ((result.masked_lengths > 0) == has_text).all()


def sequence_of(result, index):
    """Return (input_ids, masked_positions, masked_ids) of one masked sequence."""
    ends, masked_ends = np.cumsum(result.lengths), np.cumsum(result.masked_lengths)
    ids = slice(ends[index] - result.lengths[index], ends[index])
    masks = slice(masked_ends[index] - result.masked_lengths[index], masked_ends[index])
    return result.input_ids[ids], result.masked_positions[masks], result.masked_ids[masks]


@pytest.mark.parametrize("whole_words", [False, True])
def test_dynamic_masks_are_drawn_from_the_original_ids(whole_words):
    sequences = random_sequences(10, count=50)
    result = masked(sequences, whole_words=whole_words)
    settings = MaskingSettings(whole_word_mask=whole_words)
    dynamic = DynamicMasking(settings, table(whole_words), seed=3)
    rows = np.split(sequences.input_ids, sequences.offsets[1:-1])
    for index, row in enumerate(rows):
        ids, positions, masked_ids = dynamic(*sequence_of(result, index), epoch=2, index=index)
        np.testing.assert_array_equal(unmask(ids, positions, masked_ids), row)
        assert ids.dtype == row.dtype
        unmasked = np.delete(np.arange(len(row)), positions)
        np.testing.assert_array_equal(ids[unmasked], row[unmasked])


def test_dynamic_masks_are_a_function_of_seed_epoch_and_sequence():
    result = masked(random_sequences(11, count=5, longest=300))
    settings = MaskingSettings()

    def draw(seed, epoch, index):
        made = DynamicMasking(settings, table(), seed)
        return [array.tolist() for array in made(*sequence_of(result, 0), epoch, index)]

    first = draw(0, 0, 0)
    assert first == draw(0, 0, 0)
    others = [draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 1)]
    assert all(other[1] != first[1] for other in others)
    # The call before does not matter: one object gives the same, whatever it gave before.
    same = DynamicMasking(settings, table(), 0)
    for epoch in (3, 0, 2):
        drawn = [array.tolist() for array in same(*sequence_of(result, 0), epoch, 0)]
        assert drawn == draw(0, epoch, 0)


def test_dynamic_masks_have_the_statistics_of_fixed_ones():
    ids = np.array([BOS, *range(5, 105), EOS])
    fixed = masked(Sequences(ids, np.array([0, len(ids)])))
    dynamic = DynamicMasking(MaskingSettings(), table(), seed=0)
    epochs = 3000
    counts, shown = np.zeros(len(ids)), []
    for epoch in range(epochs):
        drawn, positions, _ = dynamic(*sequence_of(fixed, 0), epoch, 0)
        assert len(positions) == 15
        counts[positions] += 1
        shown.append(drawn[positions])
    share = 0.15
    assert np.abs(counts[1:-1] / epochs - share).max() < 4.5 * np.sqrt(share / epochs)
    became_mask = np.mean(np.concatenate(shown) == MASK)
    assert abs(became_mask - 0.8) < 4 * np.sqrt(0.16 / (15 * epochs))


def test_whole_words_are_masked_equally_often():
    rows = 20_000
    one = np.array([BOS, 6, 7, 9, 12, 13, 14, 15, EOS])  # words of 2, 1, 3 and 1 tokens
    sequences = Sequences(np.tile(one, rows), np.arange(rows + 1) * len(one))
    result = masked(sequences, whole_words=True, masked_lm_prob=3 / 7)
    counts = np.bincount(result.masked_positions, minlength=9) / rows
    expected = exact_word_probabilities([2, 1, 3, 1], 3)
    assert counts[[1, 3, 4, 7]] == pytest.approx(expected, abs=4.5 * np.sqrt(0.25 / rows))


def exact_word_probabilities(lengths, wanted):
    """Go through all orders of the words."""
    counts, orders = np.zeros(len(lengths)), list(permutations(range(len(lengths))))
    for order in orders:
        left = wanted
        for word in order:
            if lengths[word] <= left:
                counts[word] += 1
                left -= lengths[word]
    return (counts / len(orders)).tolist()


def test_settings_are_checked():
    with pytest.raises(UserError, match=r"--masked_lm_prob 0.0: must be above 0"):
        build(MaskingSettings, {"masked_lm_prob": 0.0})
    with pytest.raises(UserError, match=r"--max_seq_length 4: must be at least 8"):
        build(SequenceSettings, {"max_seq_length": 4})
    with pytest.raises(UserError, match=r"--short_seq_prob 1.5: must be at most 1"):
        build(SequenceSettings, {"short_seq_prob": 1.5})
