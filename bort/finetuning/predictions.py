"""Predictions on a task's sets: logits, metrics, the files, and the majority-class baseline."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import ContextManager, Mapping, NamedTuple, Sequence

import numpy as np

from bort.communicator import Communicator
from bort.errors import UserError
from bort.files import atomic_write, lock_folder
from bort.finetuning.classifier import Classifier
from bort.finetuning.scoring import predict_logits
from bort.finetuning.task_data import PredictionSet
from bort.sums import write_sums
from bort.types import Context, JSONMapping, JSONObject, TaskKind
from data.encoding import ClassifierLoader, encode_examples
from data.submission import write_submission
from data.task import Example, Task, is_labelled


class Scoring(NamedTuple):
    """How examples are encoded, batched and scored."""

    batch_size: int
    num_buckets: int
    cache_dir: str
    device: Context
    communicator: Communicator


def predict_sets(
    classifier: Classifier,
    task: Task,
    sets: Sequence[PredictionSet],
    scoring: Scoring,
    output_dir: str,
) -> JSONObject:
    """Predict dev and test sets and write their files into `output_dir`/<task of the set>.

    SHA256SUMS in each folder has the sums of the files. The caller holds the lock of the folder of
    `task`; those of other tasks are locked here while they are written. Returns for each set, by
    split (of other tasks than `task` by task/split): its number of rows, the messages of skipped
    rows, the metrics where it is labelled, and the file.
    Raises `UserError` when a logit is NaN or infinite, and when another process writes to a folder.
    """
    results: JSONObject = {}
    written: dict[str, list[str]] = defaultdict(list)  # names of files by task

    def locked(name: str) -> ContextManager[None]:
        folder = os.path.join(output_dir, name)
        return nullcontext() if name == task.name else lock_folder(folder, "--output_dir")

    for each in sets:
        logits = logits_of(classifier, each.examples, scoring)
        if not np.isfinite(logits).all():
            raise UserError(
                f"{each.task.name} {each.split}: the model's outputs contain NaN or infinity; its "
                "weights are damaged or its training diverged"
            )
        own = each.task.name == task.name
        name = each.split if own else f"{each.task.name}/{each.split}"
        rows = each.task.count_rows(each.examples)
        results[name] = {"rows": rows, "skipped": list(each.skipped)}
        if is_labelled(each.examples):
            results[name]["metrics"] = each.task.metrics(each.examples, logits)
        if scoring.communicator.rank == 0:
            folder = os.path.join(output_dir, each.task.name)
            with locked(each.task.name):
                path = write_predictions(each.task, each.split, each.examples, logits, folder)
            results[name]["file"] = path
            written[each.task.name].append(os.path.basename(path))
    for name, files in written.items():
        with locked(name):
            write_sums(os.path.join(output_dir, name), files)
    return results


def logits_of(classifier: Classifier, examples: Sequence[Example], scoring: Scoring) -> np.ndarray:
    """Return the logits of examples [n, classes or options], computed by all ranks."""
    network, model_config, tokenizer = classifier
    encoded = encode_examples(
        examples, tokenizer, model_config.max_len, scoring.cache_dir, scoring.communicator
    )
    loader = ClassifierLoader(
        encoded, scoring.batch_size, scoring.num_buckets, tokenizer.pad_id, None
    )
    return predict_logits(network, loader, model_config.kind, scoring.device, scoring.communicator)


def write_predictions(
    task: Task, split: str, examples: Sequence[Example], logits: np.ndarray, folder: str
) -> str:
    """Write a test set's file for the leaderboard, else labels and logits; returns its path."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{split}_predictions.jsonl")
    if split in task.test:
        submission = write_submission(task, split, examples, logits, Path(folder))
        if submission is not None:
            return str(submission)
    with atomic_write(path) as handle:
        predictions = task.predict(logits).tolist()
        for example, prediction, scores in zip(examples, predictions, logits.tolist()):
            line = {
                "uid": example.uid,
                "label": example.label,
                "prediction": prediction,
                "scores": scores,
            }
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def baseline(task: Task, train: Sequence[Example], examples: Sequence[Example]) -> dict[str, float]:
    """Return the metrics of always predicting train's most frequent label, or its mean."""
    labels = np.array([example.label for example in train], np.float64)
    if task.kind == TaskKind.REGRESSION:
        return task.metrics(examples, np.full((len(examples), 1), labels.mean()))
    choices = task.kind == TaskKind.MULTIPLE_CHOICE
    width = len(examples[0].inputs) if choices else len(task.labels)
    counts = np.bincount(labels.astype(int), minlength=width)
    return task.metrics(examples, np.tile(counts.astype(float), (len(examples), 1)))


def prediction_lines(
    predictions: JSONMapping, baselines: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """Format rows, metrics, baseline and file of each set."""
    lines = []
    for split, prediction in predictions.items():
        line = f"  {split:<16} {prediction['rows']:>7,} rows"
        if "metrics" in prediction:
            line += f"  {_shown(prediction['metrics'])}"
        if split in baselines:
            line += f"  (most frequent answer: {_shown(baselines[split])})"
        lines += [line, f"  {'':<16} {prediction['file']}", *skipped_lines(prediction["skipped"])]
    return lines


def skipped_lines(messages: Sequence[str]) -> list[str]:
    """Format the number of skipped rows and the first message."""
    if not messages:
        return []
    number = f"{len(messages):,} broken rows skipped, the first"
    return [f"  {number if len(messages) > 1 else '1 broken row skipped'}: {messages[0]}"]


def _shown(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())
