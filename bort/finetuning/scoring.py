"""Forward pass and loss of a classifier, and the logits of a whole set."""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np
from mxnet import nd

from bort.bort import SparseEmbeddingGrad, encode, encode_for_backward
from bort.communicator import Communicator, SingleProcess
from bort.devices import widened
from bort.shapes import CLS
from bort.training.job import Interrupted, StopRequested
from bort.types import Block, Context, NDArray, TaskKind
from data.encoding import ClassifierBatch, ClassifierLoader


class DeviceBatch(NamedTuple):
    """A micro-batch as float32 NDArrays on its device; the shapes are in data.encoding."""

    input_ids: NDArray
    valid_length: NDArray
    labels: NDArray
    host_ids: np.ndarray  # the input ids in the memory of the host


def to_device(batch: ClassifierBatch, device: Context) -> DeviceBatch:
    """Copy a micro-batch to a device, as float32: MXNet's operators take ids in this type."""
    host_ids = widened(batch.input_ids, device)
    arrays = (host_ids, batch.valid_length, batch.labels)
    ids, lengths, labels = (nd.array(array, ctx=device, dtype="float32") for array in arrays)
    return DeviceBatch(ids, lengths, labels, host_ids)


def forward(
    network: Block, batch: DeviceBatch, kind: str, embeddings: Optional[SparseEmbeddingGrad] = None
) -> NDArray:
    """Return float32 logits: [examples, classes or options]; for regression [examples, 1].

    embeddings: the word embeddings of the batch, for a backward pass that ends in them.
    """
    body = network.bort
    valid_length = batch.valid_length.astype(body.word_embed[0].weight.dtype, copy=False)
    cls_only = network.pooling == CLS
    if embeddings is None:
        hidden_states = encode(body, batch.input_ids, valid_length, cls_only)
    else:
        hidden_states = encode_for_backward(body, embeddings, valid_length, cls_only)
    # [inputs, outputs]
    logits = network.head(hidden_states, valid_length).astype("float32", copy=False)
    if kind == TaskKind.MULTIPLE_CHOICE:
        return logits.reshape((len(batch.labels), -1))  # [examples * options, 1] -> [.., options]
    return logits


def classification_loss(logits: NDArray, labels: NDArray, kind: str) -> NDArray:
    """Return the loss of each example, [n]: cross-entropy in nats, or half the squared error."""
    if kind == TaskKind.REGRESSION:
        return nd.square(logits.reshape((-1,)) - labels) / 2
    return -nd.pick(nd.log_softmax(logits, axis=-1), labels, axis=-1)


def predict_logits(
    network: Block,
    loader: ClassifierLoader,
    kind: str,
    device: Context,
    communicator: Optional[Communicator] = None,
    stop_requested: Optional[StopRequested] = None,
) -> np.ndarray:
    """Return the logits of every example of a set: float64 [examples, classes or options].

    The batches are split over the ranks; every rank returns all logits.
    """
    communicator = communicator or SingleProcess()
    logits: Optional[np.ndarray] = None
    for number in range(communicator.rank, loader.batches_per_epoch, communicator.size):
        if stop_requested and stop_requested():
            break
        batch = loader(number)
        batch_logits = forward(network, to_device(batch, device), kind).asnumpy()
        if logits is None:
            logits = np.zeros((len(loader.encoded.labels), batch_logits.shape[1]))
        logits[batch.indices] = batch_logits
    if stop_requested and communicator.allreduce(np.array([float(stop_requested())]))[0]:
        raise Interrupted
    if logits is None:  # more ranks than batches
        choices = kind == TaskKind.MULTIPLE_CHOICE
        width = loader.encoded.width if choices else network.classifier[3]._units
        logits = np.zeros((len(loader.encoded.labels), width))
    return communicator.allreduce(logits.reshape(-1)).reshape(logits.shape)
