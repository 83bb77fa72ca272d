"""What a trained error is to be compared with: T's entropy, and the plateau of word frequencies.

A network that ignores its input gives the same distribution everywhere. The best that it can learn
is the mean: of T's distributions, or of the true tokens. The held-out error of that mean is the
plateau on which training stays for a while; a network whose error is lower has begun to use its
input, and only then do errors tell shapes apart.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np

from data.shards import ShardSet

# Masked positions of the training shards whose mean is taken, evenly spaced: more change nothing
# that can be seen, and each is projected onto the vocabulary.
SAMPLE = 1 << 14
ROWS = 256  # projected at once


class TeacherBounds(NamedTuple):
    """In nats per masked position of the held-out shards, as cross-entropies with T."""

    entropy: float  # T's own; no error is lower
    plateau: float  # of the mean of T's distributions on the training shards


def teacher_bounds(cache: str, training: ShardSet, held_out: ShardSet) -> TeacherBounds:
    """Return the bounds of the cross-entropy with T, from the cache of its outputs."""
    _, constant = _mean_outputs(cache, training, SAMPLE)
    entropy, mean = _mean_outputs(cache, held_out)
    smallest = np.finfo(np.float32).tiny  # a float32 softmax gives 0 below it
    return TeacherBounds(entropy, -float(mean @ np.log(np.maximum(constant, smallest))))


def _mean_outputs(
    cache: str, shards: ShardSet, most: Optional[int] = None
) -> tuple[float, np.ndarray]:
    """Return mean entropy and mean distribution [vocabulary] of T at (about `most`) positions."""
    import mxnet as mx
    from mxnet import nd

    from bort.pretraining.teacher_cache import CachedTeacher, open_rows

    teacher = CachedTeacher(cache, [mx.cpu()])
    rows = open_rows(cache, shards)
    step = max(1, sum(map(len, rows)) // most) if most else 1
    entropy, count, total = 0.0, 0, 0.0
    for chosen in (each[::step] for each in rows):
        for start in range(0, len(chosen), ROWS):
            hidden = nd.array(chosen[start : start + ROWS], dtype="float32")
            log = nd.log_softmax(teacher.project(hidden), axis=-1)
            distributions = nd.exp(log)
            entropy -= float((distributions * log).sum().asscalar())
            total += distributions.asnumpy().sum(axis=0, dtype=np.float64)
            count += len(hidden)
    return entropy / count, np.asarray(total / count)


def frequency_loss(training: ShardSet, held_out: ShardSet) -> float:
    """Return the plateau of the masked-LM loss, in nats per masked position of the held-out shards.

    It is the cross-entropy with the frequencies of the masked tokens of the training shards, each
    token counted once more than it occurs.
    """
    size = training.manifest.vocab_size
    constant = _counts(training, size) + 1.0
    counts = _counts(held_out, size)
    return -float(counts @ np.log(constant / constant.sum())) / counts.sum()


def _counts(shards: ShardSet, vocab_size: int) -> np.ndarray:
    return np.sum(
        [np.bincount(shard.masked_ids, minlength=vocab_size) for shard in shards.shards], axis=0
    )
