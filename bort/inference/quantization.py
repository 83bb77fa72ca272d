"""int8 models of a fine-tuned classifier, and what int8 costs on the task's development set.

ONNX Runtime's scales its values batch by batch and needs no data. MXNet's has fixed scales, which
are calibrated: the smallest and largest value of each layer on inputs of the task.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from typing import Any, Iterator, NamedTuple

import numpy as np

from bort.errors import UserError
from bort.files import write_json
from bort.inference import onnx_graph as onnx_export
from bort.inference.onnx_graph import write
from bort.inference.runtime import (
    DATA_NAMES,
    Int8Files,
    Runtime,
    available_runtimes,
    check_classifier,
    int8_folder,
    int8_runtime,
    notes_of,
    runtime_of,
    symbol_block,
)
from bort.parameters import parameter_file
from bort.saved_model import load_model
from data.encoding import ClassifierLoader, EncodedSet, encode_examples
from data.task import MULTIPLE_CHOICE, REGRESSION, Example
from data.tasks import check_inputs_version, get_task

NUM_BUCKETS = 10
CALIBRATION_BATCH = 16


class Check(NamedTuple):
    """What one runtime says of the development set.

    score: the task's official figure, in points; cosine: of all its scores with MXNet's float32.
    """

    runtime: str
    score: float
    cosine: float


def padded_batch(encoded: EncodedSet, most: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids [n, length] and lengths [n] of at most `most` inputs, evenly spread over a set."""
    lengths = np.diff(encoded.offsets)
    chosen = np.unique(np.linspace(0, len(lengths) - 1, most).round().astype(int))
    ids = np.full((len(chosen), lengths[chosen].max()), pad_id, np.int32)
    for row, place in zip(ids, chosen):
        row[: lengths[place]] = encoded.ids[encoded.offsets[place] : encoded.offsets[place + 1]]
    return ids, lengths[chosen]


def calibrated(exported: Any, ids: np.ndarray, valid_length: np.ndarray) -> Any:
    """Return the int8 form of an exported classifier, a SymbolBlock, calibrated on a batch."""
    import mxnet as mx
    from mxnet.contrib.quantization import quantize_net_v2

    arrays = (mx.nd.array(one, dtype="float32") for one in (ids, valid_length))
    data = mx.io.NDArrayIter(
        dict(zip(DATA_NAMES, arrays)), batch_size=min(CALIBRATION_BATCH, len(ids))
    )
    # It logs every layer, twice.
    with _silence():
        return quantize_net_v2(exported, calib_data=data, calib_mode="naive", ctx=mx.cpu())


@contextmanager
def _silence() -> Iterator[None]:
    """Send what MXNet's library writes to the process's stderr to nowhere."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def int8_in_mxnet(network: Any, ids: np.ndarray, valid_length: np.ndarray) -> Any:
    """Return the int8 form of a BortClassifier, calibrated on a batch; it can be exported."""
    with tempfile.TemporaryDirectory() as folder:
        # Only a block without a signature of its own can be quantised.
        exported = os.path.join(folder, "network")
        _run(network).export(exported)
        return _run(calibrated(symbol_block(exported), ids, valid_length))


def _run(network: Any) -> Any:
    """Hybridise a classifier and run it once, which makes the graph that can be exported."""
    import mxnet as mx

    network.hybridize(static_alloc=True)
    network(mx.nd.zeros((1, 2)), mx.nd.ones(1))
    return network


def score_examples(runtime: Runtime, source: ClassifierLoader, kind: str) -> np.ndarray:
    """Score a set: float64 [examples, classes or options]."""
    found, rows = [], []
    for number in range(source.batches_per_epoch):
        batch = source(number)
        scores = runtime.scores(batch.input_ids, batch.valid_length)
        found.append(scores.reshape(len(batch.rows), -1) if kind == MULTIPLE_CHOICE else scores)
        rows.append(batch.rows)
    return np.concatenate(found).astype(np.float64)[np.argsort(np.concatenate(rows))]


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))


class Quantization:
    """Makes the int8 models of one saved classifier and compares them on its task."""

    def __init__(self, path: str, data_dir: str | None) -> None:
        """Load a classifier by its .params file or folder; its task's data lie in `data_dir`.

        Raises `UserError` when it is no classifier or has no tokenizer.
        """
        self.path = parameter_file(path)
        self.network, self.model_config, tokenizer = load_model(self.path)
        check_classifier(self.path, self.model_config)
        if tokenizer is None:
            raise UserError(f"{self.path}: no tokenizer beside it; restore the folder `tokenizer`")
        self.tokenizer = tokenizer
        self.task = get_task(
            self.model_config.task, race_cast=self.model_config.race_cast or "choices"
        )
        check_inputs_version(self.task, self.model_config.inputs_version, self.path)
        self._data_dir = data_dir

    def quantize(self, calibration_inputs: int, batch_size: int) -> list[Check]:
        """Make both models and compare all runtimes.

        Everything lands in the folder `int8` beside the .params file, whole or not at all.
        """
        folder = int8_folder(self.path)
        temporary = f"{folder}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            os.makedirs(temporary)
            checks = self._fill(Int8Files.of(self.path, temporary), calibration_inputs, batch_size)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return checks

    def _fill(self, files: Int8Files, calibration_inputs: int, batch_size: int) -> list[Check]:
        split = str(self.task.train)
        pad_id = self.tokenizer.pad_id
        ids, lengths = padded_batch(self._encoded(split)[0], calibration_inputs, pad_id)
        notes = notes_of(self.path, self.model_config)
        write(onnx_export.build(self.network, "int8", notes), files.onnx)
        int8_in_mxnet(self.network, ids, lengths).export(files.mxnet)
        checks = self.compare(files, batch_size)
        record = {
            "parameters_sha256": notes["parameters_sha256"],
            "positions": self.network.bort.encoder._max_length,
            "onnx-int8": {
                "weights": "int8, a scale for each column",
                "values": "uint8, a scale for each batch",
            },
            "mxnet-int8": {
                "weights": "int8, a scale for each matrix",
                "values": "a scale for each layer, by its smallest and largest value",
                "calibration": {"task": self.task.name, "split": split, "inputs": len(ids)},
            },
            "development set": {"task": self.task.name, "split": self.task.dev[0]},
            "checks": [check._asdict() for check in checks],
        }
        write_json(files.record, record)
        return checks

    def compare(self, files: Int8Files, batch_size: int) -> list[Check]:
        """Score the (first) development set in every runtime, MXNet in float32 first."""
        encoded, examples = self._encoded(self.task.dev[0])
        pad_id = self.tokenizer.pad_id
        source = ClassifierLoader(encoded, batch_size, NUM_BUCKETS, pad_id, seed=None)
        positions = self.network.bort.encoder._max_length
        checks: list[Check] = []
        expected = np.empty(0)
        for name in available_runtimes():
            if name.endswith("int8"):
                runtime = int8_runtime(files, name, positions)
            else:
                runtime = runtime_of(self.network, name)
            scores = score_examples(runtime, source, self.model_config.kind)
            expected = expected if checks else scores
            values = scores[:, 0] if self.model_config.kind == REGRESSION else scores
            points = 100 * self.task.score(self.task.metrics(examples, values))
            checks.append(Check(name, points, _cosine(scores, expected)))
        return checks

    def _encoded(self, split: str) -> tuple[EncodedSet, list[Example]]:
        examples = self.task.read(self._data_dir, split).examples
        return encode_examples(examples, self.tokenizer, self.model_config.max_len), examples
