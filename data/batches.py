"""Batches of pretraining sequences: buckets, padding, and an order that can be resumed anywhere.

The order is a stream of micro-batches without end, numbered from 0. Which sequences micro-batch k
holds is a pure function of (seed, k): neither the number of ranks nor where a run was interrupted
enters. Rank r of W takes micro-batches r, r + W, ...; each epoch uses every sequence once.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Generator, Iterable, NamedTuple, Optional, Sequence, TypeVar

import numpy as np

from data.shards import Shard, ShardSet

Item = TypeVar("Item")
Made = TypeVar("Made")

# The version of the order: a run cannot go on in another one.
SAMPLER_VERSION = 2
# Batches of a bucket among which its shuffled sequences are sorted by length, at most half of the
# bucket's: more would pad a little less (SST-2: 1.02 tokens for each real one, with 100 batches
# 1.002), and would let the same sequences meet in every epoch.
POOL = 8


class Batch(NamedTuple):
    """One padded micro-batch."""

    input_ids: np.ndarray  # [batch, length] int32; the last columns of short rows are padding
    valid_length: np.ndarray  # [batch] int32
    masked_positions: np.ndarray  # [n] int32, into the flattened [batch * length] grid
    labels: np.ndarray  # [n] int32, the true tokens there
    teacher_hidden: Optional[np.ndarray] = None  # [n, hidden], what a teacher's cache holds there

    @property
    def tokens(self) -> int:
        """Return the number of tokens that are not padding."""
        return int(self.valid_length.sum())


class BucketSampler:
    """Decides which sequences form which micro-batch.

    Sequences of similar length share a bucket, and are sorted by length within it, so that a batch
    needs little padding to its longest one. Args:
        lengths: [sequences], in tokens.
        batch_size: sequences per micro-batch; with `use_avg_len` about that many tokens.
        num_buckets: buckets of equal width between the shortest and the longest sequence.
        seed: of the shuffling; None sorts each whole bucket and shuffles nothing, for evaluation.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        num_buckets: int,
        use_avg_len: bool = False,
        seed: int | None = None,
    ) -> None:
        self._seed = seed
        self._lengths = lengths
        edges = np.linspace(lengths.min() - 1, lengths.max(), num_buckets + 1)
        widths = np.unique(np.ceil(edges[1:]).astype(np.int64))
        self.widths = widths[np.unique(np.searchsorted(widths, lengths))]  # those that are used
        bucket_of = np.searchsorted(self.widths, lengths)
        self._buckets = [np.flatnonzero(bucket_of == b) for b in range(len(self.widths))]
        self._sizes = [
            max(1, round(batch_size / int(width))) if use_avg_len else batch_size
            for width in self.widths
        ]
        counts = [-(-len(rows) // size) for rows, size in zip(self._buckets, self._sizes)]
        self.batches_per_epoch = sum(counts)
        self._epoch_in_memory: tuple[int, list[np.ndarray]] | None = None

    def rows(self, position: int) -> np.ndarray:
        """Return the sequence numbers [batch] of micro-batch `position` of the endless stream."""
        epoch, place = divmod(position, self.batches_per_epoch)
        # Read once: the thread that prefetches may be in another epoch than its caller.
        held = self._epoch_in_memory
        if held is None or held[0] != epoch:
            held = self._epoch_in_memory = (epoch, self._epoch(epoch))
        return held[1][place]

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        if self._seed is None:
            return [batch for b in range(len(self._buckets)) for batch in self._cut(b, None)]
        generator = np.random.default_rng([self._seed, epoch])
        batches = [batch for b in range(len(self._buckets)) for batch in self._cut(b, generator)]
        return [batches[place] for place in generator.permutation(len(batches))]

    def _cut(self, bucket: int, generator: np.random.Generator | None) -> list[np.ndarray]:
        rows, size = self._buckets[bucket], self._sizes[bucket]
        half = max(1, -(-len(rows) // size) // 2)
        pool = len(rows) if generator is None else min(POOL, half) * size
        rows = rows if generator is None else generator.permutation(rows)
        pools = [rows[start : start + pool] for start in range(0, len(rows), pool)]
        rows = np.concatenate([one[np.argsort(self._lengths[one], kind="stable")] for one in pools])
        return [rows[start : start + size] for start in range(0, len(rows), size)]


def collate(shards: ShardSet | Shard, rows: np.ndarray, pad_id: int) -> Batch:
    """Gather the sequences `rows` [batch] into one micro-batch, as wide as the longest of them."""
    width = int(shards.lengths[rows].max())
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int32)
    valid_length = np.empty(len(rows), dtype=np.int32)
    positions, labels = [], []
    for place, row in enumerate(rows):
        ids, masked_positions, masked_ids = shards.sequence(int(row))
        input_ids[place, : len(ids)] = ids
        valid_length[place] = len(ids)
        positions.append(masked_positions.astype(np.int32) + place * width)
        labels.append(masked_ids.astype(np.int32))
    return Batch(input_ids, valid_length, np.concatenate(positions), np.concatenate(labels))


class PretrainingLoader:
    """Makes micro-batches of a set of shards by their number in the endless stream.

    `teacher_rows` are the rows of a teacher's cache, one array [masked positions, hidden] a shard.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: BucketSampler,
        pad_id: int,
        teacher_rows: Optional[Sequence[np.ndarray]] = None,
    ) -> None:
        self._shards = shards
        self.sampler = order
        self._pad_id = pad_id
        self._teacher_rows = teacher_rows

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of micro-batches that use every sequence once."""
        return self.sampler.batches_per_epoch

    def __call__(self, position: int) -> Batch:
        """Return micro-batch `position`."""
        rows = self.sampler.rows(position)
        batch = collate(self._shards, rows, self._pad_id)
        if self._teacher_rows is None:
            return batch
        hidden = [self._teacher_rows[shard][span] for shard, span in map(self._shards.masked, rows)]
        return batch._replace(teacher_hidden=np.concatenate(hidden))


def prefetch(
    make: Callable[[Item], Made], items: Iterable[Item], depth: int = 2
) -> Generator[Made, None, None]:
    """Yield make(item) for each item in order, made up to `depth` ahead in a thread.

    A thread, not a process: gathering rows from mapped memory is quick, and a fork after MXNet or
    Horovod has started its own threads can hang.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: deque[Future[Made]] = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
