"""Agora with the fine-tuning of this project: Socrates, Timaeus and tau of real models, and a run.

<output_dir>/<task>/config.json      the settings
                    agora.json       every round, the best model, the metrics of Timaeus
                    images.tsv       every augmented example with Timaeus' label
                    agora.png        score and data size by round
                    best.params, best.json, tokenizer/, <split>_predictions.jsonl,
                    <official file>  as in fine-tuning
                    journal.jsonl    predictions of every fit, from which a run is resumed
                    models/          the best model so far
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Iterable, Optional, Sequence

import numpy as np

from bort import jobs
from bort.agora import algorithm as agora
from bort.agora import text as agora_text
from bort.agora.algorithm import AgoraResult, Round
from bort.agora.config import AgoraRunSettings, AgoraTextSettings
from bort.agora.labellers import FileTimaeus, ModelTimaeus
from bort.agora.report import ModelMetrics, Report
from bort.agora.store import Store
from bort.agora.tau import Change, make_tau, masked_model
from bort.agora.text import FittedText, TextData
from bort.cluster import Cluster, refuse_with_cluster
from bort.communicator import SingleProcess, communicator_of_environment
from bort.config import as_dict, command_of
from bort.devices import devices_of, resolve_dtype
from bort.errors import DivergedError, UserError
from bort.files import lock_folder, read_json_as, sha256_of, write_json
from bort.finetuning.classifier import (
    Classifier,
    check_vocabulary,
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
from bort.finetuning.task_data import TaskData, read_prediction_sets, rows_sha256
from bort.parameters import fixed_parameter_file, load_parameters, parameter_file
from bort.reporter import FolderReporter
from bort.resume import changed_flags, refuse_other_config
from bort.saved_model import MASKED_LM, load_model, save_model
from bort.tokenization import TOKENIZER_FOLDER, TokenizerSettings
from bort.types import Context, Hyperparameters, JSONMapping, JSONObject
from data.task import Example, Task
from data.tasks import get_task

NEVER = 10**9  # no checkpoint inside a fit
TEST_SUM = "test_sha256"  # of the rows on which the best of the grid was measured
# The records of weights: those that every fit starts from, and those of the labeller.
PRETRAINED, TIMAEUS = "pretrained", "timaeus"
GPUS = "gpus"  # the record of the number of GPUs of a fit
# Flags that may differ when a run is resumed. The content of the search space is compared, and the
# number of GPUs of a fit.
FREE = (
    "max_rounds",
    "workers",
    "gpus",
    "output_dir",
    "cache_dir",
    "dev_batch_size",  # to be lowered where memory runs out
    "search_space",
    "timaeus_labels",
)


@dataclass(frozen=True)
class FineTuner:
    """Fine-tuning as `bort.agora.text.Tuner`; the best epoch on dev is kept."""

    task: Task
    dev: Sequence[Example]
    inputs: TaskSettings
    tokenizer: TokenizerSettings
    classifier: ClassifierSettings
    optimizer: FinetuningOptimizerSettings
    gpus: Optional[str] = None

    def fit(
        self, rows: Sequence[Example], hparams: Hyperparameters, start: Optional[str], folder: str
    ) -> np.ndarray:
        """Train from the pretrained model, or from the one in `start`; write it to `folder`.

        Returns its scores on dev, which are NaN when those of every epoch were.
        """
        alone = SingleProcess()
        classifier_flags, optimizer, run = with_values(
            (self.classifier, self.optimizer, FinetuningRunSettings()), hparams
        )
        gpus = jobs.share_of_gpus(self.gpus, *jobs.slot())
        devices = devices_of(gpus, run.cpu_contexts, alone)
        classifier = self._starting_point(classifier_flags, run.seed, hparams, start, devices)
        options = FinetuningOptions(
            folder,
            self.inputs.max_len,
            self.inputs.cache_dir,
            run.seed,
            run.log_interval,
            ckpt_interval=NEVER,
            config={"Fit": dict(hparams)},
        )
        data = TaskData(self.task, rows, {self.task.dev[0]: self.dev})
        reporter = FolderReporter(folder, alone, quiet=True)
        loop = finetuning_loop(
            prepared(classifier, optimizer.dtype, devices),
            data,
            optimizer,
            options,
            alone,
            devices,
            reporter,
        ).loop
        with contextlib.suppress(DivergedError):  # an earlier epoch may have been good
            loop.run()
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
        hparams: Hyperparameters,
        start: Optional[str],
        devices: Sequence[Context],
    ) -> Classifier:
        details, max_len = {"theta": dict(hparams)}, self.inputs.max_len
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

    def devices(self) -> Sequence[Context]:
        """Return the devices of this process; `UserError` where they or their type are not here."""
        devices = devices_of(self.gpus, 1, SingleProcess())
        resolve_dtype(self.optimizer.dtype, devices)
        return devices

    def load(self, path: str) -> tuple[Classifier, Scoring]:
        """Load a model that predicts the task, and how it scores."""
        devices = self.devices()
        classifier = load_classifier(path, self.task, devices)
        scoring = self._scoring(self.optimizer, devices)
        return prepared(classifier, self.optimizer.dtype, devices), scoring


def keep_model_only(folder: str) -> None:
    """Remove everything from the folder of a fit but its model."""
    kept = (BEST, BEST.replace(".params", ".json"), TOKENIZER_FOLDER)
    for entry in os.scandir(folder):
        if entry.name not in kept:
            shutil.rmtree(entry.path) if entry.is_dir() else os.remove(entry.path)


def run_agora(settings: AgoraTextSettings, cluster: Optional[str] = None) -> JSONObject:
    """Run Agora; returns the content of agora.json (on other ranks than 0: nothing).

    `cluster` is the address of one that makes the fits. Warnings are one line each on stderr.
    """
    communicator = communicator_of_environment()
    if communicator.size > 1 and (cluster or settings.run.workers > 1):
        flag = "--cluster" if cluster else "--workers"
        raise UserError(f"{flag}: horovodrun spreads the fits over its ranks; leave it out")
    refuse_with_cluster(cluster, "--workers", settings.run.workers, 1)
    if settings.classifier.model_parameters:
        raise UserError(
            "--model_parameters: every fit gets a new head; name its body by "
            "--pretrained_parameters, or the labeller by --timaeus"
        )
    if communicator.rank > 0:
        jobs.serve(communicator)
        return {}
    with warnings.catch_warnings(), jobs.stopped_by_sigterm():
        warnings.showwarning = _print_warning  # type: ignore[assignment]  # fewer named arguments
        executor = Cluster(cluster, _folder(settings), gpus=settings.run.gpus) if cluster else None
        with agora_text.fits_on(settings.run.workers, communicator, executor) as map_fits:
            return _Run(settings, map_fits).run()


def _folder(settings: AgoraTextSettings) -> str:
    return os.path.join(settings.run.output_dir, _task(settings).name)


def _task(settings: AgoraTextSettings) -> Task:
    task = settings.task
    return get_task(task.task_name, race_cast=task.race_cast, flag="--task_name")


def _print_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    print(f"warning: {category.__name__}: {message}", file=sys.stderr)


class _Run:
    """The parts of a run, and what it writes."""

    def __init__(self, settings: AgoraTextSettings, map_fits: agora.MapFits) -> None:
        self.settings, self.map_fits = settings, map_fits
        task = _task(settings)
        self.folder = _folder(settings)
        # A fit that diverges must not end the run.
        optimizer = dataclasses.replace(settings.optimizer, on_nonfinite="skip")
        run = FinetuningRunSettings(gpus=settings.run.gpus)
        self.space = read_space(settings.run.search_space, optimizer, settings.classifier, run)
        self.data = read_rows(task, settings.task)
        self.prediction_sets = read_prediction_sets(task, settings.task, settings.run.output_dir)
        fits = os.path.join(self.folder, "fits")
        self.tuner = FineTuner(
            task,
            self.data.dev,
            settings.task,
            settings.tokenizer,
            _pinned(settings.classifier),
            optimizer,
            settings.run.gpus,
        )
        dev = [row.inputs for row in self.data.dev]
        self.socrates = agora_text.TextSocrates(self.tuner, task, dev, fits)

    def run(self) -> JSONObject:
        """Run all rounds under the folder's lock; returns the content of agora.json."""
        refuse_other_config(self.folder, "--output_dir", {AgoraRunSettings.__name__})
        self.tuner.devices()
        tau = make_tau(self.settings.tau, self.infill, self.data.task)
        timaeus, source = self.timaeus()
        check_vocabulary(self.settings.classifier, self.settings.tokenizer)
        with lock_folder(self.folder, "--output_dir"):
            self.claim_folder()
            return self._rounds(tau, timaeus, source)

    def _rounds(self, tau: agora.Tau, timaeus: agora.Timaeus, source: str) -> JSONObject:
        settings, data = self.settings, self.data
        report = Report(self.folder, data, self.space, source)
        store = agora_text.open_store(self.folder)
        self._check_weights(store)
        test = rows_sha256(data.test)
        self._check_test(store.recall("best_of_grid"), test)
        if isinstance(timaeus, ModelTimaeus):
            report.add_timaeus(self.metrics(timaeus.score(data.dev), timaeus.score))

        def on_round(record: Round) -> None:
            """Report a round; after that of the grid, measure its best model."""
            report.add(record)
            if store.recall("best_of_grid") is None:  # later its model may be gone
                name = agora.fit_name(0, record.best)
                gone = not store.has_model(name)  # the record of its metrics was damaged
                model = self.fit_of_grid(record.best) if gone else store.load_model(name)
                content = {**self.metrics_of(model)._asdict(), TEST_SUM: test}
                store.record("best_of_grid", content)

        try:
            result = self._algorithm(timaeus, tau, store, on_round)
        except agora.OtherRunError as error:
            raise UserError(f"{self.folder}: {error}") from None
        if math.isinf(result.best.score):
            raise UserError(
                f"{settings.run.search_space}: every set diverged in every round; lower their lr, "
                "and give another --output_dir"
            )
        best = self.write_best(result)
        grid = store.recall("best_of_grid")
        first = ModelMetrics(grid["dev"], grid["test"])
        report.finish(result.best, first, best)
        shutil.rmtree(self.socrates.folder, ignore_errors=True)
        return report.content

    def _algorithm(
        self,
        timaeus: agora.Timaeus,
        tau: agora.Tau,
        store: Store,
        on_round: Callable[[Round], None],
    ) -> AgoraResult:
        settings, data = self.settings, self.data
        return agora.agora(
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
            map_fits=partial(self._fit_all, store),
            on_round=on_round,
        )

    def _fit_all(
        self, store: Store, function: Callable[[Any], Any], tasks: Sequence[Any]
    ) -> Iterable[Any]:
        """Make the fits of a round; raises `UserError` when those before had other GPUs.

        An update takes a micro-batch for each: with another number a fit is another one.
        """
        run = self.settings.run
        count = max(run.workers, jobs.slot()[1])  # of fits at a time on a machine
        found, recorded = {"each": jobs.gpus_of_each(run.gpus, count)}, store.recall(GPUS)
        if recorded is None:
            store.record(GPUS, found)
        elif recorded != found:
            raise UserError(
                f"{self.folder}: contains a run whose fits had {recorded['each']} GPU(s) each, now "
                f"{found['each']}: their updates would take other numbers of examples; give --gpus "
                "and --workers for as many, or another --output_dir"
            )
        return self.map_fits(function, tasks)

    def _check_weights(self, store: Store) -> None:
        """Record the weights of this run; raises `UserError` when they have changed."""
        start, labeller = self.tuner.classifier.pretrained_parameters, self.settings.run.timaeus
        for name, path, what in (
            (PRETRAINED, start, "fits start from other weights than --pretrained_parameters"),
            (TIMAEUS, labeller, "labeller had other weights than --timaeus"),
        ):
            if path is None:
                continue
            found, recorded = {"sha256": sha256_of(parameter_file(path))}, store.recall(name)
            if recorded is None:
                store.record(name, found)
            elif recorded != found:
                raise UserError(
                    f"{self.folder}: contains a run whose {what} {path}; restore them, or give "
                    "another --output_dir"
                )

    def _check_test(self, best_of_grid: Optional[JSONMapping], test: str) -> None:
        """Raise `UserError` when the best of the grid was measured on another test set."""
        if not (best_of_grid and best_of_grid["test"] and self.data.test):
            return
        if best_of_grid.get(TEST_SUM, test) != test:  # earlier versions have not recorded it
            raise UserError(
                f"{self.folder}: contains a run whose test set had other rows; restore them, or "
                "give another --output_dir"
            )

    def claim_folder(self) -> None:
        """Record the flags in the folder, or check those of the run that is resumed.

        Raises `UserError` naming the flags that differ, and for a model that is of no such run: it
        would be replaced.
        """
        path = os.path.join(self.folder, "config.json")
        if os.path.exists(path):
            recorded: JSONObject = {}
            for group in read_json_as(path, dict[str, JSONObject]).values():
                recorded.update(group)
            changed = changed_flags(recorded, self.settings, FREE)
            if changed:
                raise UserError(
                    f"{self.folder}: contains a run with another {', '.join(changed)}; give the "
                    "flags that it was started with, or another --output_dir"
                )
        elif os.path.exists(os.path.join(self.folder, BEST)) and not os.path.exists(
            os.path.join(self.folder, "journal.jsonl")
        ):
            raise UserError(f"{self.folder}: has another model; name another --output_dir")
        write_json(path, as_dict(*self.settings))
        shutil.rmtree(self.socrates.folder, ignore_errors=True)
        os.makedirs(self.socrates.folder, exist_ok=True)

    def infill(self) -> Change:
        """Load the masked language model for infilling."""
        path = self.settings.tau.tau_model or self.settings.classifier.pretrained_parameters
        if path is None:
            raise UserError("--tau infill needs --tau_model: a pretrained model")
        saved = load_model(path)
        if saved.model_config.kind != MASKED_LM or saved.tokenizer is None:
            raise UserError(
                f"{path}: is not a pretrained model with its tokenizer, which --tau infill needs"
            )
        return masked_model(saved.network, saved.tokenizer, self.settings.tau.tau_samples)

    def timaeus(self) -> tuple[agora.Timaeus, str]:
        """Return the labeller and its path."""
        run, task = self.settings.run, self.data.task
        if run.timaeus_labels:
            wanted = os.path.join(self.folder, "to_label.jsonl")
            return FileTimaeus(task, run.timaeus_labels, wanted), run.timaeus_labels
        try:
            classifier, scoring = self.tuner.load(str(run.timaeus))
        except UserError as error:
            raise UserError(f"--timaeus: {error}") from None

        def score(rows: Sequence[Example]) -> np.ndarray:
            return logits_of(classifier, rows, scoring)

        return ModelTimaeus(task, score), str(run.timaeus)

    def fit_of_grid(self, index: int) -> FittedText:
        """Repeat the fit of a set in the first round."""
        return self.socrates.fit(agora_text.examples_of(self.data.train), self.space[index])

    def metrics_of(self, model: FittedText) -> ModelMetrics:
        """Return the metrics of a model on dev and test."""
        return self.metrics(
            self.tuner.score(model.folder, self.data.dev),
            lambda rows: self.tuner.score(model.folder, rows),
        )

    def metrics(
        self, dev_scores: np.ndarray, score: Callable[[Sequence[Example]], np.ndarray]
    ) -> ModelMetrics:
        """Return metrics: on dev from its scores, on test, if it has labels, by `score`."""
        task, test = self.data.task, self.data.test
        on_test = task.metrics(test, score(test)) if test else None
        return ModelMetrics(task.metrics(self.data.dev, dev_scores), on_test)

    def write_best(self, result: AgoraResult) -> ModelMetrics:
        """Write the best model and its predictions in the layout of fine-tuning."""
        classifier, scoring = self.tuner.load(os.path.join(result.best.model.folder, BEST))
        metrics = self.metrics_of(result.best.model)
        details = {
            "theta": dict(result.best.hparams),
            "command": command_of("scripts/run_agora.py", *self.settings),
            "metrics": metrics._asdict(),
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
        summary = {
            "task": model_config.task,
            "model": model_config.model,
            "selected_on": self.data.task.dev[0],
            "answers": answers,
        }
        write_json(os.path.join(self.folder, METRICS), summary)
        return metrics


def _pinned(settings: ClassifierSettings) -> ClassifierSettings:
    """Return the settings with the very file of the weights.

    A pretraining run that is still training has another newest checkpoint for a later fit.
    """
    if settings.pretrained_parameters is None:
        return settings
    path = fixed_parameter_file(settings.pretrained_parameters)
    return dataclasses.replace(settings, pretrained_parameters=path)


def read_rows(task: Task, settings: TaskSettings) -> TextData:
    """Read the data of the task; print how many rows of train were dropped."""
    data = agora_text.read_text_data(
        task, settings.data_dir, settings.skip_bad_rows, settings.train_rows
    )
    if data.dropped:
        print(f"{data.dropped} rows of train were dropped: they are in dev or test")
    return data
