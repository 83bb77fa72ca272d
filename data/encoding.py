"""Examples of a task to token ids, cached on disk by their content, and batches of them.

One encoder input is `<s> A </s>`, with a second text `<s> A </s> B </s>`, and so on: the form of
pretraining. An example has one input, or one for each choice of a multiple-choice task.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Iterable, NamedTuple, Optional, Sequence

import numpy as np

from bort.arrays import read_npz, write_npz
from bort.communicator import Communicator
from bort.errors import UserError
from bort.tokenization import Tokenizer
from data.batches import BucketSampler, pad
from data.task import Example

# Examples in one file of the cache: what one rank encodes at a time.
PART = 10_000
_ARRAYS = ("ids", "lengths", "sha256")  # of a file of the cache; the sum is that of the others


class EncodedSet(NamedTuple):
    """Encoded examples.

    ids: int32, those of all inputs concatenated; input i is ids[offsets[i]:offsets[i + 1]].
    offsets: int64 [examples * width + 1].
    labels: float32 [examples], NaN for an example without label.
    width: inputs of each example.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    width: int

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each example's longest input, int64 [examples]."""
        # [examples * width] -> [examples, width] -> [examples]
        return np.diff(self.offsets).reshape(-1, self.width).max(axis=1)

    def input(self, index: int) -> np.ndarray:
        """Return the ids of one input, int32 [tokens]."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]


class ClassifierBatch(NamedTuple):
    """One padded micro-batch of examples; the inputs of an example are consecutive rows."""

    input_ids: np.ndarray  # [examples * width, length] int32
    valid_length: np.ndarray  # [examples * width] int32
    labels: np.ndarray  # [examples] float32
    indices: np.ndarray  # [examples] int64, of the examples in the set

    @property
    def tokens(self) -> int:
        """Return the number of tokens without padding."""
        return int(self.valid_length.sum())


class ClassifierLoader:
    """Makes micro-batches of an encoded set by their number in an endless stream.

    seed: for shuffling; None does not shuffle, for evaluation.
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
        encoded, indices = self.encoded, self.sampler(position)
        # [examples] -> [examples, width] -> [examples * width]
        inputs = (indices[:, None] * encoded.width + np.arange(encoded.width)).reshape(-1)
        ids, lengths = pad([encoded.input(index) for index in inputs], self._pad_id)
        return ClassifierBatch(ids, lengths, encoded.labels[indices], indices)


def encode_inputs(
    tokenizer: Tokenizer, inputs: Iterable[Sequence[str]], max_len: int
) -> list[np.ndarray]:
    """Return the ids, int32, of encoder inputs of one or several texts, cut to `max_len` tokens.

    The longest texts of an input are cut first, to equal lengths.

    Raises `ValueError` for one text in place of an input, which is a sequence of texts: its letters
    would be taken for texts; `UserError` for a `max_len` that leaves less than a token for each.
    """
    inputs = [parts if isinstance(parts, str) else tuple(parts) for parts in inputs]
    if any(isinstance(parts, str) for parts in inputs):
        raise ValueError("inputs: expected sequences of texts, found one text; write (text,)")
    widest = max(map(len, inputs), default=0)
    if max_len < 2 * widest + 1:
        plural = "s" if widest > 1 else ""
        raise UserError(f"max_len {max_len}: leaves no tokens for {widest} text{plural}")
    # Many inputs may share a passage: each text is encoded once.
    texts = list(dict.fromkeys(text for parts in inputs for text in parts))
    ids = dict(zip(texts, tokenizer.encode_batch(texts)))
    return [_joined(tokenizer, [ids[text] for text in parts], max_len) for parts in inputs]


def _joined(tokenizer: Tokenizer, parts: list[np.ndarray], max_len: int) -> np.ndarray:
    max_text_tokens = max_len - 1 - len(parts)
    if sum(map(len, parts)) > max_text_tokens:
        from gluonnlp.data.bert.glue import truncate_seqs_equal

        parts = truncate_seqs_equal(parts, max_text_tokens)
    end = [tokenizer.eos_id]
    with_ends = (ids for part in parts for ids in (part, end))
    return np.concatenate([[tokenizer.bos_id], *with_ends]).astype(np.int32)


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_len: int,
    cache_dir: Optional[str] = None,
    communicator: Optional[Communicator] = None,
) -> EncodedSet:
    """Encode examples, or read them from `cache_dir`.

    Every rank encodes its share of what the cache lacks and reads the rest, or encodes that too
    where ranks share no disk. Files of the cache are named by their content and written
    atomically: any number of runs may share it.

    Raises `UserError` for a `max_len` that leaves no tokens for text, for examples with different
    numbers of inputs, and when the cache cannot be written.
    """
    widths = {len(example.inputs) for example in examples}
    if len(widths) != 1:
        raise UserError(f"examples have {sorted(widths)} inputs: all must have the same number")
    texts = max(len(parts) for example in examples for parts in example.inputs)
    if max_len < 2 * texts + 1:
        raise UserError(
            f"--max_len {max_len}: leaves no tokens for {texts} texts; give at least "
            f"{2 * texts + 1}"
        )
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
    digest = hashlib.sha256(f"2 {tokenizer.fingerprint} {max_len}".encode())
    for example in part:
        digest.update(json.dumps(example.inputs).encode())
    return os.path.join(cache_dir, f"{digest.hexdigest()}.npz")


def _encoded_part(
    path: Optional[str], part: Sequence[Example], tokenizer: Tokenizer, max_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids [tokens] and the lengths [inputs] of a part, from the cache if it has them."""
    inputs = [parts for example in part for parts in example.inputs]
    cached = _read(path, len(inputs), max_len, tokenizer.vocab_size) if path else None
    if cached is not None:
        return cached
    rows = encode_inputs(tokenizer, inputs, max_len)
    ids, lengths = np.concatenate(rows), np.array([len(row) for row in rows], np.int64)
    if path:
        write_part(path, ids, lengths)
    return ids, lengths


def _read(
    path: str, inputs: int, max_len: int, vocab_size: int
) -> Optional[tuple[np.ndarray, np.ndarray]]:
    """Return ids and lengths of a file of the cache; None where it is missing or damaged."""
    found = read_part(path)
    if found is None:
        return None
    ids, lengths = found
    is_expected = len(lengths) == inputs and (lengths <= max_len).all() and (ids < vocab_size).all()
    return found if is_expected else None


def read_part(path: str) -> Optional[tuple[np.ndarray, np.ndarray]]:
    """Return ids and lengths of any file of a cache; None where it is missing or damaged."""
    try:
        arrays = read_npz(path)
        ids, lengths, sha256 = (arrays[name] for name in _ARRAYS)
    except (OSError, KeyError, UserError):  # the part is encoded again
        return None
    is_whole = (
        (ids.dtype, ids.ndim) == (np.int32, 1)
        and (lengths.dtype, lengths.ndim) == (np.int64, 1)
        and (lengths >= 2).all()
        and lengths.sum() == len(ids)
        and (ids >= 0).all()
        and sha256.tobytes() == _sha256(ids, lengths)
    )
    return (ids, lengths) if is_whole else None


def _sha256(ids: np.ndarray, lengths: np.ndarray) -> bytes:
    return hashlib.sha256(lengths.tobytes() + ids.tobytes()).digest()


def write_part(path: str, ids: np.ndarray, lengths: np.ndarray) -> None:
    """Write a file of the cache, with its SHA-256: token ids of all rows, lengths [rows].

    Raises `UserError` when it cannot be written.
    """
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        sha256 = np.frombuffer(_sha256(ids, lengths), np.uint8)
        write_npz(path, dict(zip(_ARRAYS, (ids, lengths, sha256))))
    except OSError as error:
        raise UserError(f"--cache_dir: {path} cannot be written ({error.strerror})") from None
    except UserError as error:
        raise UserError(f"--cache_dir: {error}") from None
