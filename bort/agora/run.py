"""Agora with the fine-tuning of this project: Socrates, Timaeus and tau of real models, and a run.

<output_dir>/<task>/config.json      the settings
                    agora.json       every round, the outcome, Timaeus' own figures
                    images.tsv       every tau-image with Timaeus' label
                    agora.png        score and data size by round
                    best.params, best.json, tokenizer/, <split>_predictions.jsonl,
                    <official file>  as in fine-tuning
                    journal.jsonl    predictions of every fit: what a killed run goes on from
                    models/          the best model so far
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from dataclasses import dataclass
from typing import Any, Iterator, Optional, Sequence

import numpy as np

from bort.agora import algorithm as agora
from bort.agora import text as agora_text
from bort.agora.algorithm import AgoraResult, Round
from bort.agora.config import AgoraTextSettings
from bort.agora.report import Outcome, Report
from bort.agora.tau import Change, make_tau, masked_model
from bort.agora.text import FittedText, TextData
from bort.communicator import Communicator, SingleProcess
from bort.config import as_dict, command_of
from bort.devices import devices_of
from bort.errors import UserError
from bort.files import read_json, write_json
from bort.finetuning.classifier import (
    Classifier,
    for_task,
    load_classifier,
    new_classifier,
    prepared,
)
from bort.finetuning.config import (
    ClassifierSettings,
    FinetuningOptimizerSettings,
    FinetuningRunSettings,
    TaskSettings,
)
from bort.finetuning.predictions import Scoring, logits_of, predict_sets
from bort.finetuning.run import BEST, METRICS, FinetuningOptions, finetuning_loop
from bort.finetuning.search_space import read_space, with_values
from bort.finetuning.task_data import TaskData, read_prediction_sets
from bort.parameters import load_parameters
from bort.saved_model import load_model, save_model
from bort.tokenization import TOKENIZER_FOLDER, TokenizerSettings
from bort.training.reporting import FolderReporter
from bort.types import Context, Hyperparameters
from data.task import Example, Task
from data.tasks import get_task

NEVER = 10**9  # no checkpoint inside a fit
# What may differ when a run goes on: where it ends, and who does the work.
FREE = {"AgoraSettings": ("max_rounds",), "AgoraRunSettings": ("workers", "gpus")}


@dataclass(frozen=True)
class FineTuner:
    """Fine-tuning as `bort.agora.text.Tuner`: the best epoch by dev is taken, as always."""

    task: Task
    dev: Sequence[Example]
    inputs: TaskSettings
    tokenizer: TokenizerSettings
    classifier: ClassifierSettings
    optimizer: FinetuningOptimizerSettings
    gpus: Optional[str] = None

    def fit(
        self, rows: Sequence[Example], theta: Hyperparameters, start: Optional[str], folder: str
    ) -> np.ndarray:
        """Train from the pretrained body, or from a model; leave the model in the folder.

        Returns its scores of dev, which are no numbers when no epoch's were.
        """
        alone = SingleProcess()
        classifier_flags, optimizer, run = with_values(
            (self.classifier, self.optimizer, FinetuningRunSettings()), theta
        )
        devices = devices_of(self.gpus, run.cpu_contexts, alone)
        classifier = self._starting_point(classifier_flags, run.seed, theta, start, devices)
        options = FinetuningOptions(
            folder,
            self.inputs.max_len,
            self.inputs.cache_dir,
            run.seed,
            run.log_interval,
            ckpt_interval=NEVER,
            config={"Fit": dict(theta)},
        )
        data = TaskData(self.task, rows, {self.task.dev[0]: self.dev})
        reporter = FolderReporter(folder, alone, quiet=True)
        loop = finetuning_loop(
            prepared(classifier, optimizer.dtype),
            data,
            optimizer,
            options,
            alone,
            devices,
            reporter,
        ).loop
        loop.run()
        if not loop.finished():
            raise UserError("interrupted; rerun the same command to resume")
        if loop.progress.best_step is None:
            save_model(os.path.join(folder, BEST), *classifier)
            return np.full((len(self.dev), max(2, self.task.num_outputs)), np.nan)
        load_parameters(classifier.network, os.path.join(folder, BEST))
        keep_model_only(folder)
        return logits_of(classifier, self.dev, self._scoring(optimizer, devices))

    def _starting_point(
        self,
        flags: ClassifierSettings,
        seed: int,
        theta: Hyperparameters,
        start: Optional[str],
        devices: Sequence[Context],
    ) -> Classifier:
        details, max_len = {"theta": dict(theta)}, self.inputs.max_len
        if start:
            path = os.path.join(start, BEST)
            loaded = load_classifier(path, self.task, devices, flags.dropout, trained=True)
            return for_task(loaded, self.task, max_len, details)
        return new_classifier(
            flags,
            self.tokenizer,
            self.task,
            devices,
            seed=seed,
            max_len=max_len,
            race_cast=self.inputs.race_cast,
            details=details,
        )

    def _scoring(
        self, optimizer: FinetuningOptimizerSettings, devices: Sequence[Context]
    ) -> Scoring:
        return Scoring(
            optimizer.dev_batch_size,
            optimizer.num_buckets,
            self.inputs.cache_dir,
            devices[0],
            SingleProcess(),
        )

    def score(self, folder: str, rows: Sequence[Example]) -> np.ndarray:
        """Return the scores of rows by the model in a folder."""
        classifier, scoring = self.load(os.path.join(folder, BEST))
        return logits_of(classifier, rows, scoring)

    def load(self, path: str) -> tuple[Classifier, Scoring]:
        """Load a model that predicts the task, and how it scores."""
        devices = devices_of(self.gpus, 1, SingleProcess())
        classifier = load_classifier(path, self.task, devices)
        scoring = self._scoring(self.optimizer, devices)
        return prepared(classifier, self.optimizer.dtype), scoring


def keep_model_only(folder: str) -> None:
    """Remove everything from the folder of a fit but its model."""
    kept = (BEST, BEST.replace(".params", ".json"), TOKENIZER_FOLDER)
    for entry in os.scandir(folder):
        if entry.name not in kept:
            shutil.rmtree(entry.path) if entry.is_dir() else os.remove(entry.path)


def run_agora(settings: AgoraTextSettings, communicator: Communicator) -> dict[str, Any]:
    """Do what the settings say; returns the content of agora.json (other ranks: nothing).

    Raises `UserError` for every mistake that the user can mend.
    """
    if communicator.rank > 0:
        agora_text.serve(communicator)
        return {}
    with spreading(settings.run.workers, communicator) as map_fits:
        return _Run(settings, map_fits).run()


@contextlib.contextmanager
def spreading(workers: int, communicator: Communicator) -> Iterator[agora.MapFits]:
    """Give the map that makes the fits of a round: here, in processes, or on ranks."""
    if communicator.size > 1:
        with agora_text.ranks(communicator) as map_fits:
            yield map_fits
    elif workers > 1:
        with agora_text.processes(workers) as map_fits:
            yield map_fits
    else:
        yield agora_text.one_after_another


class _Run:
    """One run: its parts, and what is written at its end."""

    def __init__(self, settings: AgoraTextSettings, map_fits: agora.MapFits) -> None:
        self.settings, self.map_fits = settings, map_fits
        task = get_task(settings.task.task_name, race_cast=settings.task.race_cast)
        self.folder = os.path.join(settings.run.output_dir, task.name)
        # A fit that diverges must not end the others.
        optimizer = dataclasses.replace(settings.optimizer, on_nonfinite="skip")
        self.space = read_space(
            settings.run.search_space, optimizer, settings.classifier, FinetuningRunSettings()
        )
        self.data = read_rows(task, settings.task)
        self.prediction_sets = read_prediction_sets(task, settings.task)
        fits = os.path.join(self.folder, "fits")
        self.tuner = FineTuner(
            task,
            self.data.dev,
            settings.task,
            settings.tokenizer,
            settings.classifier,
            optimizer,
            settings.run.gpus,
        )
        dev = [row.inputs for row in self.data.dev]
        self.socrates = agora_text.TextSocrates(self.tuner, task, dev, fits)

    def run(self) -> dict[str, Any]:
        """Go through the rounds, write everything; returns the content of agora.json."""
        settings, data, start = self.settings, self.data, time.perf_counter()
        tau = make_tau(settings.tau, self.infill)
        timaeus, source = self.timaeus()
        self.claim_folder()
        report = Report(self.folder, data, self.space, source)
        store = agora_text.open_store(self.folder)
        if isinstance(timaeus, agora_text.ModelTimaeus):
            report.timaeus(self.outcome(timaeus.score(data.dev), timaeus.score))

        def on_round(record: Round) -> None:
            report.add(record)
            if store.recall("best_of_grid") is None:  # later, its model may be gone
                model = store.load_model(agora.fit_name(0, record.best))
                store.record("best_of_grid", self.outcome_of(model)._asdict())

        result = agora.agora(
            self.socrates,
            timaeus,
            agora_text.examples_of(data.train),
            agora_text.examples_of(data.dev),
            self.space,
            tau,
            settings.agora,
            seed=settings.run.seed,
            objective=agora_text.objective_of(data.task, data.dev, settings.run.edges),
            test_inputs=data.kept_out,
            store=store,
            map_fits=self.map_fits,
            on_round=on_round,
        )
        best = self.write_best(result)
        first = Outcome(**store.recall("best_of_grid"))
        report.finish(result.best, first, best, time.perf_counter() - start)
        shutil.rmtree(self.socrates.folder, ignore_errors=True)
        return report.content

    def claim_folder(self) -> None:
        """Make the folder of the run, or find in it the run that this command goes on with.

        Raises `UserError` naming what differs when it is of another run.
        """
        path, content = os.path.join(self.folder, "config.json"), as_dict(*self.settings)
        os.makedirs(self.folder, exist_ok=True)
        if os.path.exists(path):
            before = read_json(path)
            other = [
                f"--{name}"
                for concern, values in content.items()
                for name, value in values.items()
                if name not in FREE.get(concern, ()) and before.get(concern, {}).get(name) != value
            ]
            if other:
                raise UserError(
                    f"{self.folder}: holds a run with another {', '.join(other)}; give what it was "
                    "begun with, or another --output_dir"
                )
        write_json(path, content)
        shutil.rmtree(self.socrates.folder, ignore_errors=True)
        os.makedirs(self.socrates.folder)

    def infill(self) -> Change:
        """Load the masked language model that infills."""
        path = self.settings.tau.tau_model or self.settings.classifier.pretrained_parameters
        if path is None:
            raise UserError("--tau infill needs --tau_model: a pretrained model")
        saved = load_model(path)
        if saved.model_config.kind != "masked_lm" or saved.tokenizer is None:
            raise UserError(f"{path}: is no pretrained model with its tokenizer; --tau needs one")
        return masked_model(saved, self.settings.tau.tau_samples)

    def timaeus(self) -> tuple[agora.Timaeus, str]:
        """Return the labeller and where it comes from."""
        run, task = self.settings.run, self.data.task
        if run.timaeus_labels:
            wanted = os.path.join(self.folder, "to_label.jsonl")
            return agora_text.FileTimaeus(task, run.timaeus_labels, wanted), run.timaeus_labels
        try:
            classifier, scoring = self.tuner.load(str(run.timaeus))
        except UserError as error:
            raise UserError(f"--timaeus {run.timaeus}: {error}") from None

        def score(rows: Sequence[Example]) -> np.ndarray:
            return logits_of(classifier, rows, scoring)

        return agora_text.ModelTimaeus(task, score), str(run.timaeus)

    def outcome_of(self, model: FittedText) -> Outcome:
        """Return the metrics of a model on dev and test."""
        return self.outcome(
            self.tuner.score(model.folder, self.data.dev),
            lambda rows: self.tuner.score(model.folder, rows),
        )

    def outcome(self, dev_scores: np.ndarray, score: Any) -> Outcome:
        """Return metrics: of dev from its scores, of test, where it has labels, by `score`."""
        task, test = self.data.task, self.data.test
        found = task.metrics(test, score(test)) if test else None
        return Outcome(task.metrics(self.data.dev, dev_scores), found)

    def write_best(self, result: AgoraResult) -> Outcome:
        """Write the best model and its answers in the layout of fine-tuning."""
        classifier, scoring = self.tuner.load(os.path.join(result.best.model.folder, BEST))
        outcome = self.outcome_of(result.best.model)
        details = {
            "theta": dict(result.best.theta),
            "command": command_of("scripts/run_agora.py", *self.settings),
            "metrics": outcome._asdict(),
        }
        model_config = dataclasses.replace(classifier.model_config, details=details)
        path = os.path.join(self.folder, BEST)
        save_model(path, classifier.network, model_config, classifier.tokenizer)
        answers = predict_sets(
            classifier,
            self.data.task,
            self.prediction_sets,
            scoring,
            self.settings.run.output_dir,
        )
        metrics = {
            "task": model_config.task,
            "model": model_config.model,
            "selected_on": self.data.task.dev[0],
            "answers": answers,
        }
        write_json(os.path.join(self.folder, METRICS), metrics)
        return outcome


def read_rows(task: Task, settings: TaskSettings) -> TextData:
    """Read the task's data and say how many rows of train were dropped."""
    data = agora_text.read_data(
        task, settings.data_dir, settings.skip_bad_rows, settings.train_rows
    )
    if data.dropped:
        print(f"{data.dropped} rows of train are in dev or test, too: left out")
    return data
