"""The forward pass of a masked language model at the masked positions of a batch."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

from mxnet import nd

from bort.bort import EmbeddingRows, decode, decoder_hidden, encode, encode_rows
from bort.encoder import Selection, select
from data.batches import Batch


class DeviceBatch(NamedTuple):
    """A micro-batch as NDArrays on its device (shapes: see data.batches.Batch)."""

    input_ids: Any
    valid_length: Any
    masked: Selection
    labels: Any
    teacher_hidden: Optional[Any]


def to_device(batch: Batch, device: Any) -> DeviceBatch:
    """Copy a micro-batch to a device, its ids as float32: MXNet's operators take them as such."""
    hidden = batch.teacher_hidden
    if hidden is not None:
        # A cache may hold float16: half the bytes travel, the device widens them.
        hidden = nd.array(hidden, ctx=device, dtype=hidden.dtype).astype("float32", copy=False)
    arrays = (batch.input_ids, batch.valid_length, batch.labels)
    ids, lengths, labels = (nd.array(array, ctx=device, dtype="float32") for array in arrays)
    sequences, length = batch.input_ids.shape
    masked = select(batch.masked_positions, sequences, length, device)
    return DeviceBatch(ids, lengths, masked, labels, hidden)


def masked_logits(model: Any, batch: DeviceBatch, rows: EmbeddingRows | None = None) -> Any:
    """Return the logits [n, vocabulary], float32, of a model at the masked positions.

    With `rows` the word embeddings come from there, for a backward pass that ends in them.
    """
    return decode(model, masked_states(model, batch, rows)).astype("float32", copy=False)


def masked_states(model: Any, batch: DeviceBatch, rows: EmbeddingRows | None = None) -> Any:
    """Return what the projection onto the vocabulary is given at the masked positions.

    [n, hidden] of the model's type.
    """
    valid_length = batch.valid_length.astype(model.word_embed[0].weight.dtype, copy=False)
    if rows is None:
        encoded = encode(model, batch.input_ids, valid_length, only=batch.masked)
    else:
        encoded = encode_rows(model, rows, valid_length, only=batch.masked)
    return decoder_hidden(model, encoded)
