"""Batches: every sequence once an epoch, an order that knows no ranks, padding, prefetching."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from data.batches import BucketSampler, PretrainingLoader, collate, prefetch
from data.shards import open_shards
from tests.pretraining.helpers import MASK, PAD, write_shards

LENGTHS = np.random.default_rng(0).integers(5, 60, size=101)


def epoch(order: BucketSampler, number: int) -> list[np.ndarray]:
    start = number * order.batches_per_epoch
    return [order.rows(place) for place in range(start, start + order.batches_per_epoch)]


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("use_avg_len", [False, True])
@pytest.mark.parametrize("num_buckets", [1, 3, 10, 200])
@pytest.mark.parametrize("batch_size", [1, 7, 100, 101, 1000])
def test_an_epoch_holds_every_sequence_exactly_once(batch_size, num_buckets, use_avg_len, seed):
    order = BucketSampler(LENGTHS, batch_size, num_buckets, use_avg_len, seed)
    for number in (0, 1, 5):
        rows = np.concatenate(epoch(order, number))
        assert sorted(rows) == list(range(len(LENGTHS)))


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    one, other = (BucketSampler(LENGTHS, 8, 4, seed=3) for _ in range(2))
    forward = [one.rows(place) for place in range(3 * one.batches_per_epoch)]
    # Asked backwards, epochs apart, of another object: the same batches.
    for place in reversed(range(len(forward))):
        np.testing.assert_array_equal(other.rows(place), forward[place])


def test_epochs_and_seeds_differ_and_evaluation_does_not():
    def flat(seed, number):
        return np.concatenate(epoch(BucketSampler(LENGTHS, 8, 4, seed=seed), number)).tolist()

    assert flat(3, 0) != flat(3, 1)
    assert flat(3, 0) != flat(4, 0)
    assert flat(None, 0) == flat(None, 1)


def test_shuffling_mixes_the_buckets_and_the_rows_inside_them():
    order = BucketSampler(LENGTHS, 8, 4, seed=3)
    longest = [LENGTHS[rows].max() for rows in epoch(order, 0)]
    assert longest != sorted(longest)
    assert any((np.diff(rows) < 0).any() for rows in epoch(order, 0))
    first, second = ({frozenset(rows) for rows in epoch(order, number)} for number in (0, 1))
    assert len(first & second) < len(first) / 2, "the same sequences stay together"


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_ranks_together_take_the_stream_whatever_their_number(ranks):
    stream = BucketSampler(LENGTHS, 8, 4, seed=3)
    each = [BucketSampler(LENGTHS, 8, 4, seed=3) for _ in range(ranks)]
    for step in range(2 * stream.batches_per_epoch):
        for rank, order in enumerate(each):
            position = step * ranks + rank
            np.testing.assert_array_equal(order.rows(position), stream.rows(position))


def test_a_batch_stays_within_its_bucket():
    order = BucketSampler(np.array([10, 11, 29, 30, 50]), batch_size=8, num_buckets=2, seed=0)
    assert order.widths.tolist() == [30, 50]
    assert sorted(sorted(rows) for rows in epoch(order, 0)) == [[0, 1, 2, 3], [4]]


def test_a_bucket_without_a_sequence_is_none():
    order = BucketSampler(np.array([10, 50, 50]), batch_size=8, num_buckets=5, seed=0)
    assert order.widths.tolist() == [18, 50]
    assert sorted(sorted(rows) for rows in epoch(order, 0)) == [[0], [1, 2]]


def test_evaluation_sorts_each_bucket_by_length():
    lengths = [LENGTHS[rows] for rows in epoch(BucketSampler(LENGTHS, 8, 4), 0)]
    assert (np.diff(np.concatenate(lengths)) >= 0).all()


def test_training_sorts_pools_of_batches_by_length_and_pads_little():
    lengths = np.random.default_rng(1).integers(5, 60, size=4000)
    order = BucketSampler(lengths, 8, 1, seed=3)
    batches = epoch(order, 0)
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
        order = BucketSampler(LENGTHS, 8, num_buckets)
        assert len(order.widths) <= num_buckets
        assert order.widths[-1] == LENGTHS.max()
        for rows in epoch(order, 0):
            buckets = np.searchsorted(order.widths, LENGTHS[rows])
            assert len(set(buckets)) == 1, "a batch mixes buckets"


def test_use_avg_len_gives_every_batch_about_the_same_number_of_tokens():
    lengths = np.repeat([16, 64, 128, 500], 400)
    order = BucketSampler(lengths, batch_size=512, num_buckets=8, use_avg_len=True, seed=0)
    sizes = {}
    for rows in epoch(order, 0):
        sizes.setdefault(int(lengths[rows][0]), set()).add(len(rows))
    # Widths of the buckets: 76 (16 and 64 share it), 137, 500.
    assert max(sizes[16]) == max(sizes[64]) == round(512 / 76)
    assert max(sizes[128]) == round(512 / 137)
    assert sizes[500] == {1}


def test_a_sequence_longer_than_the_token_budget_still_gets_a_batch():
    order = BucketSampler(np.array([300, 300]), batch_size=64, num_buckets=3, use_avg_len=True)
    assert [rows.tolist() for rows in epoch(order, 0)] == [[0], [1]]


def test_one_length_makes_one_bucket():
    order = BucketSampler(np.full(10, 128), batch_size=4, num_buckets=10, seed=0)
    assert order.widths.tolist() == [128]
    assert sorted(len(rows) for rows in epoch(order, 0)) == [2, 4, 4]


def test_a_batch_size_above_the_data_makes_one_batch_an_epoch():
    order = BucketSampler(np.array([5, 9, 7]), batch_size=100, num_buckets=1, seed=0)
    assert order.batches_per_epoch == 1
    assert sorted(order.rows(0)) == sorted(order.rows(41)) == [0, 1, 2]


def test_masked_positions_point_to_the_masks_of_the_flattened_grid(tmp_path):
    write_shards(tmp_path, sizes=(6, 3, 4), seed=5)
    shards = open_shards(str(tmp_path))
    order = BucketSampler(shards.lengths, batch_size=4, num_buckets=3, seed=1)
    source = PretrainingLoader(shards, order, PAD)
    seen = 0
    for number in range(order.batches_per_epoch):
        rows, batch = order.rows(number), source(number)
        assert batch.input_ids.shape == (len(rows), shards.lengths[rows].max())
        grid = batch.input_ids.reshape(-1)
        # The helper masks with <mask> only, so the grid itself says where the masks are.
        assert np.flatnonzero(grid == MASK).tolist() == sorted(batch.masked_positions.tolist())
        assert batch.tokens == shards.lengths[rows].sum() == (grid != PAD).sum()
        restored = grid.copy()
        restored[batch.masked_positions] = batch.labels
        for place, row in enumerate(restored.reshape(batch.input_ids.shape)):
            # The helper's text counts upwards: only the right labels make it whole again.
            text = row[1 : batch.valid_length[place] - 1]
            assert (np.diff(text) == 1).all()
            assert (row[batch.valid_length[place] :] == PAD).all()
        seen += len(rows)
    assert seen == shards.num_sequences


def test_collate_pads_to_the_longest_and_offsets_positions_by_row():
    class TwoSequences:
        lengths = np.array([4, 3])

        def sequence(self, index):
            ids = np.array([[0, 4, 8, 2], [0, 4, 2, 2]][index], dtype=np.uint16)[: 4 - index]
            return ids, np.array([1], dtype=np.uint16), np.array([7 + index], dtype=np.uint16)

    batch = collate(TwoSequences(), np.array([1, 0]), pad_id=1)
    assert batch.input_ids.tolist() == [[0, 4, 2, 1], [0, 4, 8, 2]]
    assert batch.valid_length.tolist() == [3, 4]
    assert batch.masked_positions.tolist() == [1, 5]
    assert batch.labels.tolist() == [8, 7]
    assert {array.dtype for array in batch[:4]} == {np.dtype(np.int32)}


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


def test_prefetching_hands_on_an_error_at_its_place_and_ends_its_thread():
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
