"""Fine-tuning: a classifier on a task's train set, watched on its dev sets, its answers written.

    <output_dir>/<task>/config.json, metrics.jsonl, tensorboard/     as in pretraining
                        metrics.json                    every epoch, the best one, time, baseline
                        best.params, best.json, tokenizer/           bort.saved_model
                        <dev split>_predictions.jsonl   answers and scores of the best model
                        <official file>                 for the leaderboard, of each test split

While it runs, the newest checkpoint lies there, too.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from contextlib import contextmanager
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

import mxnet as mx
import numpy as np
from mxnet import autograd, nd

from bort import checkpoint
from bort.bort import EmbeddingRows
from bort.communicator import Communicator
from bort.devices import devices_of
from bort.errors import UserError
from bort.files import read_json, write_json
from bort.finetuning.classifier import Classifier, build_classifier
from bort.finetuning.config import FinetuningSettings
from bort.finetuning.predictions import answer, answer_lines, baseline, skipped_lines
from bort.finetuning.scoring import (
    DeviceExamples,
    class_scores,
    classification_loss,
    score_set,
    to_device,
)
from bort.parameters import load_parameters
from bort.saved_model import save_model
from bort.training.loop import Training
from bort.training.optimization import learning_rate
from data.encoding import ClassifierBatch, ClassifierLoader, encode_examples
from data.task import REGRESSION, Example, Task
from data.tasks import get_task

BEST = "best.params"
METRICS = "metrics.json"
# Where the schedule ends and training may go on (the original's fine-tuning).
LOWEST_RATE = 1e-7
SUMS = ("loss", "accuracy")
OUT_OF_MEMORY = re.compile("out of memory|memory allocat|bad_alloc|bad alloc", re.IGNORECASE)


class TaskData(NamedTuple):
    """The examples of a task: the training set and each dev set by its name."""

    task: Task
    train: Sequence[Example]
    dev: Mapping[str, Sequence[Example]]


class FineTuning(Training):
    """One run of fine-tuning: a classifier, a task's examples, and the history of its epochs."""

    def __init__(
        self,
        settings: FinetuningSettings,
        communicator: Communicator,
        classifier: Classifier,
        data: TaskData,
        folder: str,
    ) -> None:
        run, optimizer = settings.run, settings.optimizer
        self.classifier, self.data = classifier, data
        self.history: list[dict[str, Any]] = []
        self._folder = folder
        self._started = time.perf_counter()
        self._earlier_seconds = 0.0
        source = self._source(data.train, optimizer.batch_size, run.seed, settings, communicator)
        self.dev = {
            name: self._source(examples, optimizer.dev_batch_size, None, settings, communicator)
            for name, examples in data.dev.items()
        }
        devices = devices_of(run.gpus, run.cpu_contexts, communicator)
        group = optimizer.accumulate * communicator.size * len(devices)
        self.updates_per_epoch = -(-source.batches_per_epoch // group)
        steps = optimizer.training_steps or optimizer.epochs * self.updates_per_epoch
        ramp = optimizer.ramp_up_epochs
        self._schedule = ramp * self.updates_per_epoch if ramp else steps
        super().__init__(
            settings,
            communicator,
            devices,
            classifier.network,
            source,
            accumulate=optimizer.accumulate,
            last_step=steps,
            sums=SUMS,
        )

    def _source(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int | None,
        settings: FinetuningSettings,
        communicator: Communicator,
    ) -> ClassifierLoader:
        tokenizer = self.classifier.tokenizer
        encoded = encode_examples(
            examples, tokenizer, settings.task.max_len, settings.task.cache_dir, communicator
        )
        buckets = settings.optimizer.num_buckets
        return ClassifierLoader(encoded, batch_size, buckets, tokenizer.pad_id, seed)

    @property
    def folder(self) -> str:
        """Return the folder of checkpoints, metrics and results."""
        return self._folder

    @property
    def epoch(self) -> float:
        """Return how many passes over the training set have been made."""
        return self.position / self.source.batches_per_epoch

    @property
    def examples(self) -> float:
        """Return how many examples have been learnt from, each time anew."""
        return self.epoch * len(self.data.train)

    @property
    def seconds(self) -> float:
        """Return the time the run has taken, that before interruptions included."""
        return self._earlier_seconds + time.perf_counter() - self._started

    @property
    def ended(self) -> bool:
        """Tell whether the run has come to its end, and was not told to stop before."""
        return self._finished()

    def progress(self) -> dict[str, Any]:
        """Return how far the run is as plain data, with the history of its epochs and its time."""
        return {**super().progress(), "history": self.history, "seconds": self.seconds}

    def set_progress(self, progress: dict[str, Any]) -> None:
        """Go to where the `progress` of rank 0 says."""
        super().set_progress(progress)
        self.history = list(progress["history"])
        self._earlier_seconds, self._started = progress["seconds"], time.perf_counter()

    def _numbers(self, position: int) -> range:
        # The group at the end of an epoch may be smaller: no update mixes two epochs.
        epoch = self.source.batches_per_epoch
        end = (position // epoch + 1) * epoch
        return range(position, min(position + self.micro_batches, end))

    def _clear_gradients(self, numbers: range) -> None:
        super()._clear_gradients(numbers)
        # Without a decoder no backward pass writes it: the rows of the batches are only added.
        self.network.bort.word_embed[0].weight.zero_grad()

    def _subject(self) -> str:
        model_config = self.classifier.model_config
        return f"{model_config.model} on {model_config.task}, {len(self.data.train):,} examples"

    def _to_device(self, batch: ClassifierBatch, device: Any) -> DeviceExamples:
        return to_device(batch, device)

    def _rate(self) -> float:
        optimizer, step = self.settings.optimizer, self.step + 1
        if step > self._schedule:
            return min(LOWEST_RATE, optimizer.lr)
        warmup = int(self._schedule * optimizer.warmup_ratio)
        return max(
            learning_rate(step, optimizer.lr, warmup, self._schedule),
            min(LOWEST_RATE, optimizer.lr),
        )

    def _forward_backward(self, number: int, batch: DeviceExamples, tokens: int) -> None:
        self._seed_dropout(number, batch.labels.context)
        kind = self.data.task.kind
        with self._timer("model"):
            rows = EmbeddingRows(self.network.bort, batch.input_ids)
            with autograd.record():
                scores = class_scores(self.network, batch, kind, rows)
                loss = classification_loss(scores, batch.labels, kind).sum()
                scaled = self._scaled(loss)
            rows.backward(scaled)
            right = (scores.argmax(axis=-1) == batch.labels).sum()
            self._interval.add(nd.concat(loss, right, dim=0), len(batch.labels), tokens)

    def _figures(self, means: dict[str, float]) -> dict[str, float]:
        shown = {"epoch": round(self.epoch, 3), **means}
        if self.data.task.kind == REGRESSION:
            del shown["accuracy"]
        return shown

    def _evaluation_due(self) -> bool:
        ended = self.position % self.source.batches_per_epoch == 0
        return self.step > 0 and (ended or self.step == self.last_step)

    def _evaluation(self) -> dict[str, float]:
        task = self.data.task
        figures: dict[str, float] = {}
        scores = []
        for name, source in self.dev.items():
            found = score_set(self.network, source, task.kind, self.devices[0], self.communicator)
            values = task.metrics(self.data.dev[name], found)
            scores.append(task.score(values))
            figures.update({self._figure(name, metric): v for metric, v in values.items()})
        return {**figures, "score": float(np.mean(scores))}

    def _figure(self, split: str, metric: str) -> str:
        return metric if len(self.dev) == 1 else f"{split}/{metric}"

    def _score(self, evaluation: dict[str, float]) -> float:
        return evaluation["score"]

    def _is_best(self, evaluation: dict[str, float]) -> bool:
        entry = {"epoch": round(self.epoch, 3), "step": self.step, **evaluation}
        self.history.append(entry)
        best = super()._is_best(evaluation)
        if best and self._first:
            self._write_best()
        return best

    def _finished(self) -> bool:
        return super()._finished() or self._patience_is_over()

    def _patience_is_over(self) -> bool:
        patience = self.settings.optimizer.early_stop
        if not patience or not self.history:
            return False
        names = [self._figure(split, self.data.task.early_stop) for split in self.dev]
        watched = [float(np.mean([entry[name] for name in names])) for entry in self.history]
        return len(watched) - 1 - watched.index(max(watched)) >= patience

    def _checkpoint_due(self, best: bool) -> bool:
        interval = self.settings.run.ckpt_interval
        if interval:
            return self.step % interval == 0
        return self.position % self.source.batches_per_epoch == 0

    def _identity(self) -> dict[str, Any]:
        model_config = self.classifier.model_config
        return {
            "model": model_config.model,
            "task": model_config.task,
            "vocab_size": model_config.vocab_size,
            "tokenizer_fingerprint": model_config.tokenizer_fingerprint,
            "examples": len(self.data.train),
            "batches_per_epoch": self.source.batches_per_epoch,
        }

    def _require_same_stream(self, state: dict[str, Any]) -> None:
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(
                    f"--resume: the checkpoint in {self.folder} is of a run with {name} "
                    f"{state.get(name)}, now {value}; give what it was made with, or another "
                    "--output_dir"
                )
        for concern, flag in (("FinetuningRunSettings", "seed"), ("TaskSettings", "max_len")):
            then = state["settings"][concern][flag]
            now = getattr(self.settings.run if flag == "seed" else self.settings.task, flag)
            if then != now:
                raise UserError(f"--{flag} {now}: the checkpoint was made with {then}")

    def _write_model(self, path: str) -> None:
        save_model(path, self.network, self.classifier.model_config, self.classifier.tokenizer)

    def _write_best(self) -> None:
        model_config = self.classifier.model_config
        best = dataclasses.replace(
            model_config, details={**model_config.details, "metrics": self.history[-1]}
        )
        path = os.path.join(self.folder, BEST)
        save_model(path, self.network, best, self.classifier.tokenizer)


# ---- from flags to a run ------------------------------------------------------------------------


def finetune(settings: FinetuningSettings, communicator: Communicator) -> dict[str, Any]:
    """Do what the settings say; returns the content of metrics.json, empty when told to stop.

    Raises `UserError` for every mistake that the user can mend.
    """
    settings.check()
    task = get_task(settings.task.task_name, race_cast=settings.task.race_cast)
    folder = os.path.join(settings.run.output_dir, task.name)
    if settings.run.only_inference:
        return infer(settings, communicator, task, folder)
    finished = os.path.join(folder, METRICS)
    if settings.run.resume and os.path.exists(finished):
        if communicator.rank == 0:
            print(f"{finished}: the run has ended, nothing to do")
        return read_json(finished)
    data, rows = read_data(task, settings)
    classifier = build_classifier(settings, task, communicator)
    if communicator.rank == 0 and not settings.run.resume:
        refuse_other_run(folder)
    with explained_memory_errors():
        run = FineTuning(settings, communicator, classifier, data, folder)
        run.run()
        if not run.ended:
            return {}
        return conclude(run, rows)


def infer(
    settings: FinetuningSettings, communicator: Communicator, task: Task, folder: str
) -> dict[str, Any]:
    """Evaluate and predict once with a fine-tuned classifier."""
    classifier = build_classifier(settings, task, communicator)
    if classifier.model_config.task not in (task.name, task.model_task):
        raise UserError(
            f"--model_parameters {settings.classifier.model_parameters}: a model of "
            f"{classifier.model_config.task}; give one of {task.model_task or task.name}"
        )
    with explained_memory_errors():
        results = answer(classifier, task, settings, communicator, folder)
    if not results:
        raise UserError(f"{task.name}: neither a dev nor a test set is there; see --data_dir")
    if communicator.rank == 0:
        print("\n".join([task.name, *answer_lines(results, {})]))
    return results


def read_data(task: Task, settings: FinetuningSettings) -> tuple[TaskData, dict[str, Any]]:
    """Read the training and dev sets; returns them and the rows read and skipped by split."""
    given = settings.task
    if task.train is None:
        raise UserError(
            f"--task_name {task.name}: has no training set; fine-tune {task.model_task} and "
            "predict with --only_inference --model_parameters"
        )
    splits = {
        name: task.read(
            given.data_dir, name, skip_bad_rows=given.skip_bad_rows, seed=settings.run.seed
        )
        for name in (task.train, *task.dev)
    }
    rows = {name: task.count_rows(split.examples) for name, split in splits.items()}
    skipped = [message for split in splits.values() for message in split.skipped]
    train = splits.pop(task.train).examples[: given.train_rows]
    data = TaskData(task, train, {name: split.examples for name, split in splits.items()})
    return data, {"rows": rows, "skipped": skipped}


def refuse_other_run(folder: str) -> None:
    """Raise `UserError` when the folder holds another run's results or checkpoints."""
    if os.path.exists(os.path.join(folder, BEST)) or checkpoint.steps(folder):
        raise UserError(
            f"{folder}: holds another run; --resume goes on with it, another --output_dir starts "
            "anew"
        )


@contextmanager
def explained_memory_errors() -> Iterator[None]:
    """Turn MXNet's error about memory into one that says what helps."""
    try:
        yield
    except (mx.MXNetError, MemoryError) as error:
        if isinstance(error, mx.MXNetError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        raise UserError(
            "out of memory: lower --batch_size and raise --accumulate by the same factor, or "
            "lower --max_len or --dev_batch_size"
        ) from None


# ---- what a run leaves --------------------------------------------------------------------------


def conclude(run: FineTuning, rows: dict[str, Any]) -> dict[str, Any]:
    """Write what the best model answers and what the run was; returns the metrics."""
    if run.best_step is None:
        raise UserError(f"{run.folder}: no evaluation gave a score; lower --lr")
    if run.communicator.rank == 0:
        load_parameters(run.network, os.path.join(run.folder, BEST))
    run.communicator.broadcast(run.parameters())
    data, settings = run.data, run.settings
    answers = answer(run.classifier, data.task, settings, run.communicator, run.folder)
    seconds = run.seconds
    metrics = {
        "task": data.task.name,
        "model": run.classifier.model_config.model,
        **rows,
        "train_examples": len(data.train),
        "steps": run.step,
        "best": next(one for one in run.history if one["step"] == run.best_step),
        "baseline": {
            name: baseline(data.task, data.train, examples) for name, examples in data.dev.items()
        },
        "answers": answers,
        "history": run.history,
        "seconds": round(seconds, 1),
        "examples_per_second": round(run.examples / seconds, 1),
    }
    if run.communicator.rank == 0:
        write_json(os.path.join(run.folder, METRICS), metrics)
        checkpoint.remove_all(run.folder)
        print(summary(metrics), flush=True)
    run.communicator.barrier()
    return metrics


def summary(metrics: dict[str, Any]) -> str:
    """Return what a run came to, for the screen."""
    best = metrics["best"]
    first = (
        f"{metrics['task']}: best of {len(metrics['history'])} evaluations at epoch "
        f"{best['epoch']:g} (step {best['step']})"
    )
    last = f"  {metrics['seconds']:,} s, {metrics['examples_per_second']:,} examples/s"
    answers = answer_lines(metrics["answers"], metrics["baseline"])
    return "\n".join([first, *answers, *skipped_lines(metrics["skipped"]), last])
