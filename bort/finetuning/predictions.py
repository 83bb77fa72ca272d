"""What a classifier answers on a task's sets: scores, metrics, the files, and what to beat."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from bort.communicator import Communicator
from bort.finetuning.classifier import Classifier
from bort.finetuning.scoring import score_set
from bort.types import Context
from data.encoding import ClassifierLoader, encode_examples
from data.submission import write_submission
from data.task import MULTIPLE_CHOICE, REGRESSION, Example, Task, is_labelled
from data.tasks import get_task, task_names


class Scoring(NamedTuple):
    """How examples are encoded, batched and scored."""

    batch_size: int
    num_buckets: int
    cache_dir: str
    device: Context
    communicator: Communicator


class Predicting(NamedTuple):
    """Where the sets of a task are read from, and where the predictions go."""

    data_dir: Optional[str]
    skip_bad_rows: bool
    output_dir: str  # of the tasks this one predicts, each in a folder of its name
    scoring: Scoring


def answer(
    classifier: Classifier, task: Task, predicting: Predicting, folder: str
) -> dict[str, Any]:
    """Predict the dev and test sets that are there, and those of the tasks this one predicts.

    Returns, by split, rows and what is known of the predictions: metrics and the file they are in;
    and what is wrong with rows that were skipped.
    """
    results: dict[str, Any] = {}
    dependent = [other for other in map(get_task, task_names()) if other.model_task == task.name]
    for each in (task, *dependent):
        target = folder if each is task else os.path.join(predicting.output_dir, each.name)
        for split in (*each.dev, *each.test):
            if each.find(predicting.data_dir, split) is None:
                continue
            examples, skipped = each.read(
                predicting.data_dir, split, skip_bad_rows=predicting.skip_bad_rows
            )
            scores = scores_of(classifier, examples, predicting.scoring)
            name = split if each is task else f"{each.name}/{split}"
            results[name] = {"rows": each.count_rows(examples), "skipped": skipped}
            if is_labelled(examples):
                results[name]["metrics"] = each.metrics(examples, scores)
            if predicting.scoring.communicator.rank == 0:
                results[name]["file"] = write_answers(each, split, examples, scores, target)
    return results


def scores_of(classifier: Classifier, examples: Sequence[Example], scoring: Scoring) -> np.ndarray:
    """Score examples [n, classes or options] with a classifier, split over the ranks."""
    network, model_config, tokenizer = classifier
    encoded = encode_examples(
        examples, tokenizer, model_config.max_len, scoring.cache_dir, scoring.communicator
    )
    source = ClassifierLoader(
        encoded, scoring.batch_size, scoring.num_buckets, tokenizer.pad_id, None
    )
    return score_set(network, source, model_config.kind, scoring.device, scoring.communicator)


def write_answers(
    task: Task, split: str, examples: Sequence[Example], scores: np.ndarray, folder: str
) -> str:
    """Write the leaderboard's file of a test set, else answers with scores; returns its path."""
    os.makedirs(folder, exist_ok=True)
    written = None
    if split in task.test:
        written = write_submission(task, split, examples, scores, Path(folder))
    if written is not None:
        return str(written)
    path = os.path.join(folder, f"{split}_predictions.jsonl")
    with open(f"{path}.tmp", "w", encoding="utf-8") as handle:
        for example, found, row in zip(examples, task.predict(scores).tolist(), scores.tolist()):
            line = {"uid": example.uid, "label": example.label, "prediction": found, "scores": row}
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(f"{path}.tmp", path)
    return path


def baseline(task: Task, train: Sequence[Example], examples: Sequence[Example]) -> dict[str, float]:
    """Return the metrics of always giving the most frequent answer of train, or its mean."""
    labels = np.array([example.label for example in train], np.float64)
    if task.kind == REGRESSION:
        return task.metrics(examples, np.full((len(examples), 1), labels.mean()))
    width = len(examples[0].inputs) if task.kind == MULTIPLE_CHOICE else len(task.labels)
    counts = np.bincount(labels.astype(int), minlength=width)
    return task.metrics(examples, np.tile(counts.astype(float), (len(examples), 1)))


def answer_lines(
    answers: Mapping[str, Any], baselines: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """Return, for the screen, rows, metrics and file of each set, and what to beat."""
    lines = []
    for split, found in answers.items():
        line = f"  {split:<16} {found['rows']:>7,} rows"
        if "metrics" in found:
            line += f"  {_shown(found['metrics'])}"
        if split in baselines:
            line += f"  (most frequent answer: {_shown(baselines[split])})"
        lines += [line, f"  {'':<16} {found['file']}", *skipped_lines(found["skipped"])]
    return lines


def skipped_lines(messages: Sequence[str]) -> list[str]:
    """Return, for the screen, how many broken rows were passed over, and the first of them."""
    return [f"  {len(messages)} broken rows skipped: {messages[0]}, ..."] if messages else []


def _shown(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())
