"""What a model says at the masked positions of a batch, and how good that is on a held-out set."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Protocol

import numpy as np
from mxnet import nd

from bort.bort import EmbeddingRows, decode, decoder_hidden, encode, encode_rows
from bort.communicator import Communicator
from bort.distillation import correct_predictions, distillation_kl, masked_lm_loss
from bort.encoder import Selection, join_projections, select
from data.batches import Batch, BatchSource


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


class Teacher(Protocol):
    """Whoever knows the right distributions: a network, or the cache of one."""

    def logits(self, batch: DeviceBatch) -> Any:
        """Return the logits [n, vocabulary], float32, at the masked positions."""


class LiveTeacher:
    """A frozen network that is run on every batch."""

    def __init__(self, network: Any) -> None:
        self.network = network
        join_projections(network.encoder)

    def logits(self, batch: DeviceBatch) -> Any:
        """Return the logits [n, vocabulary] of the network."""
        return masked_logits(self.network, batch)


def evaluate(
    student: Any,
    teacher: Teacher | None,
    source: BatchSource,
    temperature: float,
    communicator: Communicator,
    device: Any,
) -> dict[str, float]:
    """Measure a model on every batch of a held-out set, split over the ranks.

    Returns means over all masked positions: mlm_loss (nats), accuracy, and with a teacher
    teacher_accuracy and kl, which is temperature^2 * KL(teacher || student) at the temperature.
    """
    sums = np.zeros(5)
    for number in range(communicator.rank, source.order.batches_per_epoch, communicator.size):
        batch = to_device(source(number), device)
        logits = masked_logits(student, batch)
        parts = [masked_lm_loss(logits, batch.labels).sum()]
        parts.append(correct_predictions(logits, batch.labels))
        if teacher is not None:
            teacher_logits = teacher.logits(batch)
            parts.append(distillation_kl(logits, teacher_logits, temperature).sum())
            parts.append(correct_predictions(teacher_logits, batch.labels))
        values = nd.concat(*parts, dim=0).asnumpy()
        sums[: len(values)] += values
        sums[4] += len(batch.labels)
    mlm, correct, kl, teacher_correct, positions = communicator.sum(sums)
    result = {"mlm_loss": mlm / positions, "accuracy": correct / positions}
    if teacher is not None:
        result.update(kl=kl / positions, teacher_accuracy=teacher_correct / positions)
    return result
