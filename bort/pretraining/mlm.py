"""The forward pass of a masked language model at the masked positions of a batch."""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np
from mxnet import nd

from bort.bort import SparseEmbeddingGrad, decode, decoder_hidden, encode, encode_for_backward
from bort.devices import widened
from bort.encoder import GatherIndices, gather_indices
from bort.types import Block, Context, NDArray
from data.batches import Batch


class DeviceBatch(NamedTuple):
    """A micro-batch as NDArrays on its device (shapes: see data.batches.Batch)."""

    input_ids: NDArray
    valid_length: NDArray
    masked: GatherIndices
    labels: NDArray
    teacher_hidden: Optional[NDArray]
    host_ids: np.ndarray  # the input ids in the memory of the host


def to_device(batch: Batch, device: Context) -> DeviceBatch:
    """Copy a micro-batch to a device, its ids as float32, which MXNet's operators expect."""
    hidden = batch.teacher_hidden
    if hidden is not None:
        # A cache may hold float16: half the bytes are copied, and converted on the device.
        hidden = nd.array(hidden, ctx=device, dtype=hidden.dtype).astype("float32", copy=False)
    sequences, length = batch.input_ids.shape
    host_ids = widened(batch.input_ids, device)
    # From the grid of `length` columns to that of the widened ids.
    added = host_ids.shape[1] - length
    positions = batch.masked_positions + added * (batch.masked_positions // length)
    arrays = (host_ids, batch.valid_length, batch.labels)
    ids, lengths, labels = (nd.array(array, ctx=device, dtype="float32") for array in arrays)
    masked = gather_indices(positions, sequences, host_ids.shape[1], device)
    return DeviceBatch(ids, lengths, masked, labels, hidden, host_ids)


def masked_logits(
    model: Block, batch: DeviceBatch, embeddings: SparseEmbeddingGrad | None = None
) -> NDArray:
    """Return the logits [n, vocabulary], float32, of a model at the masked positions.

    `embeddings` are the word embeddings of the batch, for a backward pass.
    """
    return decode(model, masked_states(model, batch, embeddings)).astype("float32", copy=False)


def masked_states(
    model: Block, batch: DeviceBatch, embeddings: SparseEmbeddingGrad | None = None
) -> NDArray:
    """Return the decoder's hidden states [n, hidden] at the masked positions, in the model's dtype.

    They are the input of the projection onto the vocabulary.
    """
    valid_length = batch.valid_length.astype(model.word_embed[0].weight.dtype, copy=False)
    if embeddings is None:
        encoded = encode(model, batch.input_ids, valid_length, positions=batch.masked)
    else:
        encoded = encode_for_backward(model, embeddings, valid_length, positions=batch.masked)
    return decoder_hidden(model, encoded)
