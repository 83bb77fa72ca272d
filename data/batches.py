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


class BatchOrder:
    """Decides which sequences form which micro-batch.

    Sequences of similar length share a bucket and are padded to the bucket's width. Args:
        lengths: [sequences], in tokens.
        batch_size: sequences per micro-batch; with `use_avg_len` about that many tokens.
        num_buckets: buckets of equal width between the shortest and the longest sequence.
        seed: of the shuffling; None keeps the order of the buckets, for evaluation.
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
        edges = np.linspace(lengths.min() - 1, lengths.max(), num_buckets + 1)
        self.widths = np.unique(np.ceil(edges[1:]).astype(np.int64))
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

    def width(self, longest: int) -> int:
        """Return the width of the bucket that a sequence of this length belongs to."""
        return int(self.widths[np.searchsorted(self.widths, longest)])

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        if self._seed is None:
            return [batch for b in range(len(self._buckets)) for batch in self._cut(b, None)]
        generator = np.random.default_rng([self._seed, epoch])
        batches = [batch for b in range(len(self._buckets)) for batch in self._cut(b, generator)]
        return [batches[place] for place in generator.permutation(len(batches))]

    def _cut(self, bucket: int, generator: np.random.Generator | None) -> list[np.ndarray]:
        rows = self._buckets[bucket]
        rows = rows if generator is None else generator.permutation(rows)
        size = self._sizes[bucket]
        return [rows[start : start + size] for start in range(0, len(rows), size)]


def collate(shards: ShardSet | Shard, rows: np.ndarray, width: int, pad_id: int) -> Batch:
    """Gather the sequences `rows` [batch] into one micro-batch of `width` columns."""
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


class BatchSource:
    """Makes micro-batches of a set of shards by their number in the endless stream.

    `teacher_rows` are the rows of a teacher's cache, one array [masked positions, hidden] a shard.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: BatchOrder,
        pad_id: int,
        teacher_rows: Optional[Sequence[np.ndarray]] = None,
    ) -> None:
        self._shards = shards
        self.order = order
        self._pad_id = pad_id
        self._teacher_rows = teacher_rows

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of micro-batches that use every sequence once."""
        return self.order.batches_per_epoch

    def __call__(self, position: int) -> Batch:
        """Return micro-batch `position`."""
        rows = self.order.rows(position)
        width = self.order.width(int(self._shards.lengths[rows].max()))
        batch = collate(self._shards, rows, width, self._pad_id)
        if self._teacher_rows is None:
            return batch
        hidden = [self._teacher_rows[shard][span] for shard, span in map(self._shards.masked, rows)]
        return batch._replace(teacher_hidden=np.concatenate(hidden))


def prefetched(
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
