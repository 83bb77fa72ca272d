"""int8 models of a fine-tuned classifier, and their scores on the task's development set.

ONNX Runtime quantizes activations dynamically, batch by batch, and needs no data. MXNet's int8 uses
static scales: each layer's minimum and maximum on calibration inputs of the task.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from typing import Any, Iterator, NamedTuple, Optional, Sequence, TypeVar

import numpy as np

from bort.errors import UserError
from bort.files import lock_folder, sha256_of, temporary_folder, write_json
from bort.inference.onnx_file import write_onnx
from bort.inference.onnx_graph import build
from bort.inference.runtime import (
    DATA_NAMES,
    Backend,
    Int8Files,
    available_backends,
    backend_for,
    check_classifier,
    int8_backend,
    int8_folder,
    load_symbol_block,
    metadata_of,
)
from bort.parameters import check_finite, mxnet_writes, parameter_file
from bort.saved_model import load_model, require_tokenizer
from bort.types import Block, TaskKind
from data.batches import pad
from data.encoding import ClassifierLoader, EncodedSet, encode_examples
from data.task import Example
from data.tasks import check_inputs_version, get_task

NUM_BUCKETS = 10
CALIBRATION_BATCH = 16
# Less than any error of int8, and enough for MXNet to see that it is negative.
_NEGATIVE = -1e-6

T = TypeVar("T")


class Check(NamedTuple):
    """The development set in one backend; part of the record.

    score: the task's official metric, in points; cosine: similarity of all logits to those of
        MXNet in float32.
    """

    runtime: str
    score: float
    cosine: float


def calibration_batch(
    encoded: EncodedSet, count: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids [n, length] and lengths [n] of at most `count` evenly spread inputs of a set."""
    chosen = evenly_spread(range(len(encoded.offsets) - 1), count)
    return pad([encoded.input(index) for index in chosen], pad_id)


def evenly_spread(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` different items of a sequence, from its first on."""
    chosen = np.unique(np.linspace(0, len(items) - 1, count).round().astype(int))
    return [items[index] for index in chosen]


def quantize_in_mxnet(network: Block, ids: np.ndarray, valid_length: np.ndarray) -> Block:
    """Return the int8 form of a BortClassifier, calibrated on a batch; it can be exported.

    ids: [n, length]; valid_length: [n].
    """
    with tempfile.TemporaryDirectory() as folder:
        # MXNet quantizes only blocks that were exported and imported.
        exported = os.path.join(folder, "network")
        with mxnet_writes(exported), _negative_biases(network):
            _hybridize(network).export(exported)
        return _hybridize(_calibrate(load_symbol_block(exported), ids, valid_length))


@contextmanager
def _negative_biases(network: Block) -> Iterator[None]:
    """Make one bias of each attention layer negative while its graph is exported.

    The graph concatenates the biases of query, key and value. MXNet quantizes a tensor without
    negative values to uint8, which its int8 FullyConnected does not accept as a bias. A change of
    the key's bias has no effect: it adds the same number to the scores of all keys.
    """
    changed: list[tuple[Any, Any]] = []
    for layer in network.bort.encoder.transformer_cells:
        cell = layer.attention_cell
        biases = (cell.query_bias, cell.key_bias, cell.value_bias)
        if min(float(bias.data().asnumpy().min()) for bias in biases) > _NEGATIVE:
            before = cell.key_bias.data().copy()
            changed.append((cell.key_bias, before))
            after = before.copy()
            after[0] = _NEGATIVE
            cell.key_bias.set_data(after)
    try:
        yield
    finally:
        for bias, before in changed:
            bias.set_data(before)


def _calibrate(exported: Block, ids: np.ndarray, valid_length: np.ndarray) -> Block:
    import mxnet as mx
    from mxnet.contrib.quantization import quantize_net_v2

    arrays = (mx.nd.array(array, dtype="float32") for array in (ids, valid_length))
    data = mx.io.NDArrayIter(
        dict(zip(DATA_NAMES, arrays)), batch_size=min(CALIBRATION_BATCH, len(ids))
    )
    with _silent_stderr():  # MXNet logs every layer, twice
        return quantize_net_v2(
            exported,
            calib_data=data,
            calib_mode="naive",
            # The sums of residuals of a pretrained network have a few channels with values 40 times
            # as large as the rest: in int8 the rest would have a handful of levels. (A scale for
            # each output of a matrix is more exact; MXNet then quantizes the weights at each call.)
            exclude_operators=["elemwise_add"],
            ctx=mx.cpu(),
        )


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard what MXNet's library writes to the process's stderr."""
    with open(os.devnull, "w", encoding="utf-8") as devnull:
        stderr = os.dup(2)
        os.dup2(devnull.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _hybridize(network: Block) -> Block:
    """Hybridize a classifier and run it once, which makes the graph that can be exported."""
    import mxnet as mx

    network.hybridize(static_alloc=True)
    network(mx.nd.zeros((1, 2)), mx.nd.ones(1))
    return network


def predict_logits(backend: Backend, loader: ClassifierLoader, kind: str) -> np.ndarray:
    """Return the logits of a set in its order: float64 [examples, classes or options]."""
    logits, indices = [], []
    for position in range(loader.batches_per_epoch):
        batch = loader(position)
        values = backend.logits(batch.input_ids, batch.valid_length)
        # Multiple choice: [examples * options, 1] -> [examples, options]
        choices = kind == TaskKind.MULTIPLE_CHOICE
        logits.append(values.reshape(len(batch.indices), -1) if choices else values)
        indices.append(batch.indices)
    return np.concatenate(logits).astype(np.float64)[np.argsort(np.concatenate(indices))]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))


class Quantization:
    """Makes the int8 models of one saved classifier and compares them on its task."""

    def __init__(self, path: str, data_dir: str | None) -> None:
        """Load a classifier by its .params file or folder; the task's data are in `data_dir`.

        Raises `UserError` when it is not a classifier of a task, has no tokenizer or has
        parameters that are NaN or infinite.
        """
        self.path = parameter_file(path)
        self.network, self.model_config, tokenizer = load_model(self.path)
        check_classifier(self.path, self.model_config)
        check_finite(self.path, self.network)
        self.tokenizer = require_tokenizer(tokenizer, self.path)
        if not self.model_config.task:
            raise UserError(f"{self.path}: is not the model of a task, whose data int8 needs")
        self.task = get_task(
            self.model_config.task, race_cast=self.model_config.race_cast or "choices"
        )
        check_inputs_version(self.task, self.model_config.inputs_version, self.path)
        self._data_dir = data_dir

    def quantize(self, calibration_inputs: int, batch_size: int) -> list[Check]:
        """Write both models into the folder `int8` beside the .params file; compare all backends.

        The record is written last, with the SHA-256 of each file. Nothing changes when anything
        fails before.

        Raises `UserError` for missing data and when the folder cannot be written.
        """
        folder = int8_folder(self.path)
        try:
            with lock_folder(folder), temporary_folder(folder, "models") as temporary:
                files = Int8Files.of(self.path, temporary)
                record, checks = self._make(files, calibration_inputs, batch_size)
                for path in files.models:
                    os.replace(path, os.path.join(folder, os.path.basename(path)))
                write_json(Int8Files.of(self.path).record, record)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
        return checks

    def _make(
        self, files: Int8Files, calibration_inputs: int, batch_size: int
    ) -> tuple[dict[str, object], list[Check]]:
        """Write the models; return their record and the comparison."""
        split = str(self.task.train)
        pad_id = self.tokenizer.pad_id
        encoded, _ = self.encode(split, calibration_inputs)
        ids, lengths = calibration_batch(encoded, calibration_inputs, pad_id)
        metadata = metadata_of(self.path, self.model_config)
        write_onnx(build(self.network, "int8", metadata), files.onnx)
        quantized = quantize_in_mxnet(self.network, ids, lengths)
        with mxnet_writes(files.mxnet):
            quantized.export(files.mxnet)
        checks = self._compare(files, batch_size)
        record = {
            "parameters_sha256": metadata["parameters_sha256"],
            "sha256": {os.path.basename(path): sha256_of(path) for path in files.models},
            "positions": self.network.bort.encoder._max_length,
            "onnx-int8": {
                "weights": "int8, a scale for each column",
                "values": "uint8, a scale for each batch",
            },
            "mxnet-int8": {
                "weights": "int8, a scale for each matrix",
                "values": "a scale for each layer, from its minimum and maximum",
                "calibration": {"task": self.task.name, "split": split, "inputs": len(ids)},
            },
            "development set": {"task": self.task.name, "split": self.task.dev[0]},
            "checks": [check._asdict() for check in checks],
        }
        return record, checks

    def _compare(self, files: Int8Files, batch_size: int) -> list[Check]:
        """Score the (first) development set in every backend, MXNet in float32 first."""
        encoded, examples = self.encode(self.task.dev[0])
        loader = ClassifierLoader(encoded, batch_size, NUM_BUCKETS, self.tokenizer.pad_id, None)
        kind = self.model_config.kind
        checks: list[Check] = []
        reference = np.empty(0)
        for name in available_backends():
            if name.endswith("int8"):
                backend = int8_backend(files, name, self.model_config.vocab_size)
            else:
                backend = backend_for(self.network, name)
            logits = predict_logits(backend, loader, kind)
            reference = reference if checks else logits
            values = logits[:, 0] if kind == TaskKind.REGRESSION else logits
            points = 100 * self.task.score(self.task.metrics(examples, values))
            checks.append(Check(name, points, _cosine(logits, reference)))
        return checks

    def encode(self, split: str, at_most: Optional[int] = None) -> tuple[EncodedSet, list[Example]]:
        """Read a split of the task's data; tokenize all or `at_most` evenly spread examples."""
        examples = self.task.read(self._data_dir, split).examples
        if at_most is not None:
            examples = evenly_spread(examples, at_most)
        return encode_examples(examples, self.tokenizer, self.model_config.max_len), examples
