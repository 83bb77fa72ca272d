"""Batches: every sequence once an epoch, an order that knows no ranks, padding, prefetching."""

from __future__ import annotations

import hashlib
import threading
import time
import tracemalloc

import numpy as np
import pytest

import create_pretraining_data
from bort.errors import UserError
from bort.files import read_json, write_json
from bort.tokenization import TOKENIZER_FOLDER, TokenizerSettings, load_tokenizer
from data.batches import (
    BucketSampler,
    PretrainingLoader,
    collate,
    open_dynamic_masking,
    pad,
    prefetch,
)
from data.masking import unmask
from data.shards import open_shards
from tests.conftest import ROOT
from tests.pretraining.helpers import MASK, PAD, write_shards

LENGTHS = np.random.default_rng(0).integers(5, 60, size=101)


def epoch(sampler: BucketSampler, number: int) -> list[np.ndarray]:
    start = number * sampler.batches_per_epoch
    return [sampler(place) for place in range(start, start + sampler.batches_per_epoch)]


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("use_avg_len", [False, True])
@pytest.mark.parametrize("num_buckets", [1, 3, 10, 200])
@pytest.mark.parametrize("batch_size", [1, 7, 100, 101, 1000])
def test_an_epoch_holds_every_sequence_exactly_once(batch_size, num_buckets, use_avg_len, seed):
    sampler = BucketSampler(LENGTHS, batch_size, num_buckets, use_avg_len, seed)
    for number in (0, 1, 5):
        rows = np.concatenate(epoch(sampler, number))
        assert sorted(rows) == list(range(len(LENGTHS)))


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    one, other = (BucketSampler(LENGTHS, 8, 4, seed=3) for _ in range(2))
    forward = [one(place) for place in range(3 * one.batches_per_epoch)]
    # Asked backwards, epochs apart, of another object: the same batches.
    for place in reversed(range(len(forward))):
        np.testing.assert_array_equal(other(place), forward[place])


def test_the_order_is_that_of_earlier_versions():
    # The SHA-256 of what the first version with SAMPLER_VERSION 2 gave: runs are resumed with it.
    lengths, digest = np.random.default_rng(11).integers(5, 400, size=5003), hashlib.sha256()
    for batch_size, num_buckets, use_avg_len, seed in [
        (8, 10, False, 3),
        (1, 1, False, 0),
        (700, 40, True, 9),
        (6000, 2, False, 1),
        (301, 2, False, 1),
    ]:
        sampler = BucketSampler(lengths, batch_size, num_buckets, use_avg_len, seed)
        for place in range(3 * sampler.batches_per_epoch):
            digest.update(sampler(place).tobytes() + b"|")
    assert digest.hexdigest() == "b243d8edaca614654ec50d488ad0e730798a1c6c03c80a6861460aaeabd11de7"


@pytest.mark.parametrize("batch_size", [2, 8])
def test_the_order_takes_less_than_16_bytes_a_sequence(batch_size):
    count = 200_000
    lengths = np.random.default_rng(0).integers(5, 513, count).astype(np.int32)
    tracemalloc.start()
    sampler = BucketSampler(lengths, batch_size, 10, seed=1)
    for place in (0, sampler.batches_per_epoch - 1, sampler.batches_per_epoch):
        sampler(place)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak + lengths.nbytes < 16 * count


def test_epochs_and_seeds_differ_and_evaluation_does_not():
    def flat(seed, number):
        return np.concatenate(epoch(BucketSampler(LENGTHS, 8, 4, seed=seed), number)).tolist()

    assert flat(3, 0) != flat(3, 1)
    assert flat(3, 0) != flat(4, 0)
    assert flat(None, 0) == flat(None, 1)


def test_shuffling_mixes_the_buckets_and_the_rows_inside_them():
    sampler = BucketSampler(LENGTHS, 8, 4, seed=3)
    longest = [LENGTHS[rows].max() for rows in epoch(sampler, 0)]
    assert longest != sorted(longest)
    assert any((np.diff(rows) < 0).any() for rows in epoch(sampler, 0))
    first, second = ({frozenset(rows) for rows in epoch(sampler, number)} for number in (0, 1))
    assert len(first & second) < len(first) / 2, "the same sequences stay together"


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_any_number_of_ranks_together_consumes_the_stream(ranks):
    stream = BucketSampler(LENGTHS, 8, 4, seed=3)
    each = [BucketSampler(LENGTHS, 8, 4, seed=3) for _ in range(ranks)]
    for step in range(2 * stream.batches_per_epoch):
        for rank, sampler in enumerate(each):
            position = step * ranks + rank
            np.testing.assert_array_equal(sampler(position), stream(position))


def test_a_batch_stays_within_its_bucket():
    sampler = BucketSampler(np.array([10, 11, 29, 30, 50]), batch_size=8, num_buckets=2, seed=0)
    assert sampler.widths.tolist() == [30, 50]
    assert sorted(sorted(rows) for rows in epoch(sampler, 0)) == [[0, 1, 2, 3], [4]]


def test_a_bucket_without_sequences_is_left_out():
    sampler = BucketSampler(np.array([10, 50, 50]), batch_size=8, num_buckets=5, seed=0)
    assert sampler.widths.tolist() == [18, 50]
    assert sorted(sorted(rows) for rows in epoch(sampler, 0)) == [[0], [1, 2]]


def test_evaluation_sorts_each_bucket_by_length_and_begins_with_the_longest():
    lengths = [LENGTHS[rows] for rows in epoch(BucketSampler(LENGTHS, 8, 4), 0)]
    assert (np.diff(np.concatenate(lengths[::-1])) >= 0).all()


def test_training_sorts_pools_of_batches_by_length_and_pads_little():
    lengths = np.random.default_rng(1).integers(5, 60, size=4000)
    sampler = BucketSampler(lengths, 8, 1, seed=3)
    batches = epoch(sampler, 0)
    assert all((np.diff(lengths[rows]) >= 0).all() for rows in batches)
    spread = [np.ptp(lengths[rows]) for rows in batches]
    # Eight sorted draws in a pool of 64 out of 55 lengths span about a ninth of these.
    assert 3 < np.mean(spread) < 9
    padded = sum(len(rows) * lengths[rows].max() for rows in batches)
    assert padded < 1.12 * lengths.sum()
    shuffled = lengths[np.random.default_rng(0).permutation(4000)].reshape(-1, 8)
    assert 8 * shuffled.max(axis=1).sum() > 1.6 * lengths.sum(), "without sorting"


def test_buckets_are_at_most_as_many_as_asked_for_and_cover_every_length():
    for num_buckets in (1, 2, 7, 60, 500):
        sampler = BucketSampler(LENGTHS, 8, num_buckets)
        assert len(sampler.widths) <= num_buckets
        assert sampler.widths[-1] == LENGTHS.max()
        for rows in epoch(sampler, 0):
            buckets = np.searchsorted(sampler.widths, LENGTHS[rows])
            assert len(set(buckets)) == 1, "a batch mixes buckets"


def test_use_avg_len_gives_every_batch_about_the_same_number_of_tokens():
    lengths = np.repeat([16, 64, 128, 500], 400)
    sampler = BucketSampler(lengths, batch_size=512, num_buckets=8, use_avg_len=True, seed=0)
    sizes = {}
    for rows in epoch(sampler, 0):
        sizes.setdefault(int(lengths[rows][0]), set()).add(len(rows))
    # Widths of the buckets: 76 (16 and 64 share it), 137, 500.
    assert max(sizes[16]) == max(sizes[64]) == round(512 / 76)
    assert max(sizes[128]) == round(512 / 137)
    assert sizes[500] == {1}


def test_a_sequence_longer_than_the_token_budget_still_gets_a_batch():
    sampler = BucketSampler(np.array([300, 300]), batch_size=64, num_buckets=3, use_avg_len=True)
    assert [rows.tolist() for rows in epoch(sampler, 0)] == [[1], [0]]


def test_one_length_makes_one_bucket():
    sampler = BucketSampler(np.full(10, 128), batch_size=4, num_buckets=10, seed=0)
    assert sampler.widths.tolist() == [128]
    assert sorted(len(rows) for rows in epoch(sampler, 0)) == [2, 4, 4]


def test_a_batch_size_above_the_data_makes_one_batch_an_epoch():
    sampler = BucketSampler(np.array([5, 9, 7]), batch_size=100, num_buckets=1, seed=0)
    assert sampler.batches_per_epoch == 1
    assert sorted(sampler(0)) == sorted(sampler(41)) == [0, 1, 2]


def test_masked_positions_point_to_the_masks_of_the_flattened_grid(tmp_path):
    write_shards(tmp_path, sizes=(6, 3, 4), seed=5)
    shards = open_shards(str(tmp_path))
    sampler = BucketSampler(shards.lengths, batch_size=4, num_buckets=3, seed=1)
    loader = PretrainingLoader(shards, sampler, PAD)
    seen = 0
    for number in range(sampler.batches_per_epoch):
        indices, batch = sampler(number), loader(number)
        assert batch.input_ids.shape == (len(indices), shards.lengths[indices].max())
        grid = batch.input_ids.reshape(-1)
        # The helper masks with <mask> only, so the grid itself says where the masks are.
        assert np.flatnonzero(grid == MASK).tolist() == sorted(batch.masked_positions.tolist())
        assert batch.tokens == shards.lengths[indices].sum() == (grid != PAD).sum()
        restored = grid.copy()
        restored[batch.masked_positions] = batch.labels
        for place, row in enumerate(restored.reshape(batch.input_ids.shape)):
            # The helper's text counts upwards: only the right labels restore it.
            text = row[1 : batch.valid_length[place] - 1]
            assert (np.diff(text) == 1).all()
            assert (row[batch.valid_length[place] :] == PAD).all()
        seen += len(indices)
    assert seen == shards.num_sequences


def test_collate_pads_to_the_longest_and_offsets_positions_by_row():
    sequences = [
        (np.array([0, 4, 2], np.uint16), np.array([1], np.uint16), np.array([8], np.uint16)),
        (np.array([0, 4, 8, 2], np.uint16), np.array([1], np.uint16), np.array([7], np.uint16)),
    ]
    batch = collate(sequences, pad_id=1)
    assert batch.input_ids.tolist() == [[0, 4, 2, 1], [0, 4, 8, 2]]
    assert batch.valid_length.tolist() == [3, 4]
    assert batch.masked_positions.tolist() == [1, 5]
    assert batch.labels.tolist() == [8, 7]
    assert {array.dtype for array in batch[:4]} == {np.dtype(np.int32)}


def test_a_batch_without_masks_is_collated():
    nothing = np.zeros(0, np.uint16)
    batch = collate([(np.array([0, 3, 2], np.uint16), nothing, nothing)] * 2, pad_id=1)
    assert batch.input_ids.shape == (2, 3)
    assert len(batch.masked_positions) == len(batch.labels) == 0


def dynamic_loader(folder, seed=0):
    shards = open_shards(str(folder))
    sampler = BucketSampler(shards.lengths, batch_size=3, num_buckets=2, seed=seed)
    masking = open_dynamic_masking(str(folder), shards, seed)
    return shards, PretrainingLoader(shards, sampler, shards.manifest.pad_id, masking=masking)


def originals(batch):
    """Return the rows of a batch without masks and padding."""
    grid = batch.input_ids.reshape(-1).copy()
    grid[batch.masked_positions] = batch.labels
    rows = grid.reshape(batch.input_ids.shape)
    return [row[:length].tolist() for row, length in zip(rows, batch.valid_length)]


def test_dynamic_masking_draws_new_masks_of_the_same_text_in_each_epoch(tmp_path):
    create_pretraining_data.main(
        [f"--input_file={ROOT}/test_data/sample_text.txt", f"--output_dir={tmp_path}",
         "--num_workers=1", "--max_seq_length=64", "--whole_word_mask"]
    )  # fmt: skip
    shards, loader = dynamic_loader(tmp_path)
    text = sorted(unmask(*shards.sequence(index)).tolist() for index in range(shards.num_sequences))
    masks = []
    for epoch in range(2):
        places = range(epoch * loader.batches_per_epoch, (epoch + 1) * loader.batches_per_epoch)
        batches = {place: loader(place) for place in places}
        assert sorted(row for batch in batches.values() for row in originals(batch)) == text
        drawn = {}
        for place, batch in batches.items():
            rows, length = loader.sampler(place), batch.input_ids.shape[1]
            for row, index in enumerate(rows):
                inside = batch.masked_positions // length == row
                drawn[int(index)] = (batch.masked_positions[inside] % length).tolist()
        masks.append(drawn)
    fixed = {index: shards.sequence(index)[1].tolist() for index in range(shards.num_sequences)}
    for one, other in [(masks[0], masks[1]), (masks[0], fixed)]:
        assert sum(one[index] != other[index] for index in one) > 0.9 * len(one)
    # A resumed run, a micro-batch later and in another order: the same bits.
    _, resumed = dynamic_loader(tmp_path)
    for place in (2 * loader.batches_per_epoch - 1, 3, 2 * loader.batches_per_epoch - 1):
        for one, other in zip(resumed(place)[:4], loader(place)[:4]):
            np.testing.assert_array_equal(one, other)


def test_dynamic_masking_needs_the_tokenizer_of_the_shards(tmp_path):
    write_shards(tmp_path, sizes=(6,), seed=5)
    with pytest.raises(UserError, match=r"--dynamic_masking: .* does not hold the tokenizer of"):
        dynamic_loader(tmp_path)
    load_tokenizer(TokenizerSettings()).save(str(tmp_path / TOKENIZER_FOLDER))
    with pytest.raises(UserError, match=r"/tokenizer: is not the tokenizer of the shards; restore"):
        dynamic_loader(tmp_path)
    manifest = read_json(str(tmp_path / "manifest.json"))
    manifest["tokenizer"]["fingerprint"] = load_tokenizer(TokenizerSettings()).fingerprint
    for name, value in [("masked_lm_prob", "x"), ("masked_lm_prob", 2.0), ("whole_word_mask", 3)]:
        manifest["arguments"] = {name: value}
        write_json(str(tmp_path / "manifest.json"), manifest)
        with pytest.raises(UserError, match=name):
            dynamic_loader(tmp_path)


def test_dynamic_masking_is_refused_with_a_teacher_cache(tmp_path):
    write_shards(tmp_path, sizes=(6,), seed=5)
    shards = open_shards(str(tmp_path))
    with pytest.raises(UserError, match="--dynamic_masking with --teacher_cache"):
        PretrainingLoader(
            shards, BucketSampler(shards.lengths, 2, 1), PAD, teacher_rows=[], masking=object()
        )


def test_padding_to_a_width():
    ids, lengths = pad([np.array([5, 6]), np.array([7])], pad_id=1, width=4)
    assert ids.tolist() == [[5, 6, 1, 1], [7, 1, 1, 1]]
    assert lengths.tolist() == [2, 1]
    assert pad([np.array([5, 6])], pad_id=1)[0].shape == (1, 2)


def threads() -> int:
    return threading.active_count()


def test_prefetching_keeps_the_order_and_runs_ahead():
    before, made = threads(), []

    def make(item):
        made.append(item)
        return item * item

    results = prefetch(make, iter(range(20)), depth=2)
    assert next(results) == 0
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert made == [0, 1, 2], "two more are made while the first is in use"
    assert list(results) == [item * item for item in range(1, 20)]
    assert threads() == before


def test_prefetching_raises_an_error_at_its_place_and_ends_its_thread():
    before = threads()

    def make(item):
        if item == 3:
            raise ValueError("batch 3 is broken")
        return item

    results = prefetch(make, iter(range(10)))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="batch 3 is broken"):
        next(results)
    assert threads() == before


def test_closing_early_ends_the_thread_of_an_endless_stream():
    before = threads()
    results = prefetch(lambda item: item, iter(int, 1))
    assert next(results) == 0
    results.close()
    assert threads() == before
