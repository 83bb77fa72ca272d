"""What a classifier says of encoded examples, how far it is from their labels, and its scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from mxnet import nd

from bort.bort import EmbeddingRows, encode, encode_rows
from bort.communicator import Communicator, SingleProcess
from data.encoding import ClassifierBatch, ClassifierLoader
from data.task import MULTIPLE_CHOICE, REGRESSION


class DeviceExamples(NamedTuple):
    """A micro-batch as float32 NDArrays on its device (shapes: see data.encoding)."""

    input_ids: Any
    valid_length: Any
    labels: Any


def to_device(batch: ClassifierBatch, device: Any) -> DeviceExamples:
    """Copy a micro-batch to a device, as float32: MXNet's operators take ids as such."""
    arrays = (batch.input_ids, batch.valid_length, batch.labels)
    return DeviceExamples(*(nd.array(array, ctx=device, dtype="float32") for array in arrays))


def class_scores(
    network: Any, batch: DeviceExamples, kind: str, rows: EmbeddingRows | None = None
) -> Any:
    """Return float32 scores: [examples, classes or options], for regression [examples, 1].

    With `rows` the word embeddings come from there, for a backward pass that ends in them.
    """
    body = network.bort
    valid_length = batch.valid_length.astype(body.word_embed[0].weight.dtype, copy=False)
    if rows is None:
        sequence = encode(body, batch.input_ids, valid_length, first_only=True)
    else:
        sequence = encode_rows(body, rows, valid_length, first_only=True)
    scores = network.head(sequence).astype("float32", copy=False)
    return scores.reshape((len(batch.labels), -1)) if kind == MULTIPLE_CHOICE else scores


def classification_loss(scores: Any, labels: Any, kind: str) -> Any:
    """Return the loss of each example, [n]: cross-entropy in nats, or half the squared error."""
    if kind == REGRESSION:
        return nd.square(scores.reshape((-1,)) - labels) / 2
    return -nd.pick(nd.log_softmax(scores, axis=-1), labels, axis=-1)


def score_set(
    network: Any,
    source: ClassifierLoader,
    kind: str,
    device: Any,
    communicator: Communicator | None = None,
) -> np.ndarray:
    """Score every example of a set: float64 [examples, classes or options].

    The batches are split over the ranks; every rank returns all scores.
    """
    communicator = communicator or SingleProcess()
    scores: np.ndarray | None = None
    for number in range(communicator.rank, source.batches_per_epoch, communicator.size):
        batch = source(number)
        found = class_scores(network, to_device(batch, device), kind).asnumpy()
        if scores is None:
            scores = np.zeros((len(source.encoded.labels), found.shape[1]))
        scores[batch.indices] = found
    if scores is None:  # more ranks than batches
        width = source.encoded.width if kind == MULTIPLE_CHOICE else network.classifier[3]._units
        scores = np.zeros((len(source.encoded.labels), width))
    return communicator.allreduce(scores.reshape(-1)).reshape(scores.shape)
