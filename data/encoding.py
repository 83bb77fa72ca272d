"""Examples of a task to token ids, kept on disk by their content, and batches of them.

One encoder input is `<s> A </s>`, with a second text `<s> A </s> B </s>`, and so on: the form that
pretraining has, too. An example has one input, or one for each option of a multiple choice.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Iterable, NamedTuple, Optional, Sequence

import numpy as np

from bort.communicator import Communicator
from bort.errors import UserError
from bort.files import NPZ_ERRORS
from bort.tokenization import Tokenizer
from data.batches import BucketSampler
from data.task import Example

# Examples in one file of the cache: what one rank encodes at a time.
PART = 10_000


class EncodedSet(NamedTuple):
    """Encoded examples.

    ids: int32, those of all inputs one after another; input i is ids[offsets[i]:offsets[i + 1]].
    offsets: int64 [examples * width + 1].
    labels: float32 [examples], NaN where there is none.
    width: inputs of each example.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    width: int

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each example's longest input, int64 [examples]."""
        return np.diff(self.offsets).reshape(-1, self.width).max(axis=1)


class ClassifierBatch(NamedTuple):
    """One padded micro-batch of examples, the inputs of one example one after another."""

    input_ids: np.ndarray  # [examples * width, length] int32
    valid_length: np.ndarray  # [examples * width] int32
    labels: np.ndarray  # [examples] float32
    rows: np.ndarray  # [examples] int64: which examples of the set

    @property
    def tokens(self) -> int:
        """Return the number of tokens that are not padding."""
        return int(self.valid_length.sum())


class ClassifierLoader:
    """Makes micro-batches of an encoded set by their number in an endless stream.

    seed None shuffles nothing, for evaluation.
    """

    def __init__(
        self, encoded: EncodedSet, batch_size: int, num_buckets: int, pad_id: int, seed: int | None
    ) -> None:
        self.encoded = encoded
        self.sampler = BucketSampler(encoded.lengths, batch_size, num_buckets, seed=seed)
        self._pad_id = pad_id

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of micro-batches that use every example once."""
        return self.sampler.batches_per_epoch

    def __call__(self, position: int) -> ClassifierBatch:
        """Return micro-batch `position`."""
        encoded, rows = self.encoded, self.sampler.rows(position)
        inputs = (rows[:, None] * encoded.width + np.arange(encoded.width)).reshape(-1)
        lengths = np.diff(encoded.offsets)[inputs]
        ids = np.full((len(inputs), lengths.max()), self._pad_id, np.int32)
        for place, one in enumerate(inputs):
            ids[place, : lengths[place]] = encoded.ids[encoded.offsets[one] :][: lengths[place]]
        return ClassifierBatch(ids, lengths.astype(np.int32), encoded.labels[rows], rows)


def encode_inputs(
    tokenizer: Tokenizer, inputs: Iterable[Sequence[str]], max_len: int
) -> list[np.ndarray]:
    """Return the ids, int32, of encoder inputs of one or several texts, cut to `max_len` tokens.

    The longest texts of an input are cut first, to equal lengths.
    """
    inputs = list(inputs)
    # A passage stands in many inputs: each text is encoded once.
    texts = list(dict.fromkeys(text for one in inputs for text in one))
    ids = dict(zip(texts, tokenizer.encode_batch(texts)))
    return [_joined(tokenizer, [ids[text] for text in one], max_len) for one in inputs]


def _joined(tokenizer: Tokenizer, parts: list[np.ndarray], max_len: int) -> np.ndarray:
    room = max_len - 1 - len(parts)
    if sum(map(len, parts)) > room:
        from gluonnlp.data.bert.glue import truncate_seqs_equal

        parts = truncate_seqs_equal(parts, room)
    end = [tokenizer.eos_id]
    return np.concatenate([[tokenizer.bos_id], *(p for part in parts for p in (part, end))]).astype(
        np.int32
    )


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_len: int,
    cache_dir: Optional[str] = None,
    communicator: Optional[Communicator] = None,
) -> EncodedSet:
    """Encode examples; those that `cache_dir` holds are read from there.

    Every rank encodes its share of what is not there, and reads the others' (or encodes it too,
    where ranks do not share a disk). Raises `UserError` for a `max_len` without room for text and
    for examples of different numbers of inputs.
    """
    widths = {len(example.inputs) for example in examples}
    if len(widths) != 1:
        raise UserError(f"examples have {sorted(widths)} inputs: they must all have as many")
    most = max(len(one) for example in examples for one in example.inputs)
    if max_len < 2 * most + 1:
        raise UserError(f"--max_len {max_len}: no room for {most} texts; give more")
    parts = [examples[start : start + PART] for start in range(0, len(examples), PART)]
    paths = [_cache_path(cache_dir, part, tokenizer, max_len) for part in parts]
    if communicator is not None and communicator.size > 1 and cache_dir:
        for number in range(communicator.rank, len(parts), communicator.size):
            _encoded_part(paths[number], parts[number], tokenizer, max_len)
        communicator.barrier()
    encoded = [_encoded_part(path, part, tokenizer, max_len) for path, part in zip(paths, parts)]
    ids, lengths = (np.concatenate(arrays) for arrays in zip(*encoded))
    labels = [np.nan if example.label is None else example.label for example in examples]
    return EncodedSet(
        ids=ids,
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        labels=np.array(labels, np.float32),
        width=widths.pop(),
    )


def _cache_path(
    cache_dir: Optional[str], part: Sequence[Example], tokenizer: Tokenizer, max_len: int
) -> Optional[str]:
    """Return the file of a part: its name is the hash of all that decides its content."""
    if not cache_dir:
        return None
    digest = hashlib.sha256(f"1 {tokenizer.fingerprint} {max_len}".encode())
    for example in part:
        digest.update(json.dumps(example.inputs).encode())
    return os.path.join(cache_dir, f"{digest.hexdigest()}.npz")


def _encoded_part(
    path: Optional[str], part: Sequence[Example], tokenizer: Tokenizer, max_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and the lengths of the inputs, from the cache where it has them."""
    if path and os.path.exists(path):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return arrays["ids"], arrays["lengths"]
        except NPZ_ERRORS:
            pass  # encoded again, and written again
    rows = encode_inputs(tokenizer, (one for e in part for one in e.inputs), max_len)
    ids, lengths = np.concatenate(rows), np.array([len(row) for row in rows], np.int64)
    if path:
        _write(path, ids, lengths)
    return ids, lengths


def _write(path: str, ids: np.ndarray, lengths: np.ndarray) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "wb") as handle:
            np.savez(handle, ids=ids, lengths=lengths)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--cache_dir: {path} cannot be written ({error.strerror})") from None
