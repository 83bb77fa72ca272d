"""Fine-tuning: train a classifier on a task, evaluate it after each epoch, write predictions.

    <output_dir>/<task>/config.json, metrics.jsonl, tensorboard/     as in pretraining
                        metrics.json                    every epoch, the best one, time, baseline
                        best.params, best.json, tokenizer/           bort.saved_model
                        <dev split>_predictions.jsonl   predictions and logits of the best model
                        <official file>                 for the leaderboard, of each test split

During the run the newest checkpoint is there, too.
"""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Mapping, Optional, Sequence

import numpy as np
from mxnet import autograd, nd

from bort import bfloat16, checkpoint
from bort.bort import SparseEmbeddingGrad
from bort.communicator import Communicator, lock_of_rank_0
from bort.config import as_dict
from bort.devices import devices_of, memory_errors, resolve_dtype, stored_dtype
from bort.errors import UserError
from bort.files import lock_folder, read_json_as, require_writable, write_json
from bort.finetuning.classifier import Classifier, build_classifier, task_of
from bort.finetuning.config import (
    ClassifierSettings,
    FinetuningOptimizerSettings,
    FinetuningRunSettings,
    FinetuningSettings,
    TaskSettings,
)
from bort.finetuning.predictions import (
    Scoring,
    baseline,
    predict_sets,
    prediction_lines,
    skipped_lines,
)
from bort.finetuning.scoring import (
    DeviceBatch,
    classification_loss,
    forward,
    predict_logits,
    to_device,
)
from bort.finetuning.task_data import (
    SETS,
    PredictionSet,
    TaskData,
    read_prediction_sets,
    read_task_data,
    sets_sha256,
)
from bort.parameters import load_parameters, parameter_file
from bort.reporter import FolderReporter, Reporter
from bort.resume import refuse_other_config, same_value, warn_of
from bort.saved_model import read_model_config, save_model, save_model_config
from bort.tokenization import refuse_other_tokenizer
from bort.training.job import (
    Evaluation,
    Job,
    Metrics,
    Progress,
    Resumed,
    SavePolicy,
    StopRequested,
    Stream,
)
from bort.training.loop import Loop
from bort.training.optimization import bias_correction, linear_warmup_decay, make_trainer
from bort.training.reporting import PhaseTimer
from bort.types import Block, Context, JSONMapping, JSONObject, NDArray, TaskKind
from data.encoding import ClassifierBatch, ClassifierLoader, encode_examples
from data.task import Example, Task

BEST = "best.params"
# What a resumed run cannot change. The micro-batch of a number depends on batch size and buckets.
FIXED_FLAGS: Mapping[type, Sequence[str]] = {
    FinetuningRunSettings: ("seed",),
    TaskSettings: ("max_len",),
    FinetuningOptimizerSettings: ("batch_size", "num_buckets", "dtype"),
    ClassifierSettings: (
        *("pooling", "extra_layer", "init", "prob"),
        *("pretrained_parameters", "model_parameters"),
    ),
}
METRICS = "metrics.json"
# The learning rate after the schedule has ended (the original's fine-tuning).
LOWEST_RATE = 1e-7
MEMORY_CURE = (
    "lower --batch_size and raise --accumulate by the same factor, or lower --max_len or "
    "--dev_batch_size"
)


class History:
    """The evaluations of a run and the time it has taken, interruptions left out."""

    def __init__(self) -> None:
        self.entries: list[JSONObject] = []
        self._started = time.perf_counter()
        self._earlier_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Return the time the run has taken, that before interruptions included."""
        return self._earlier_seconds + time.perf_counter() - self._started

    def state(self) -> JSONObject:
        """Return plain data for a checkpoint."""
        return {"history": self.entries, "seconds": self.seconds}

    def load_state(self, state: JSONMapping) -> None:
        """Restore what `state` returned."""
        self.entries = list(state["history"])
        self._earlier_seconds, self._started = state["seconds"], time.perf_counter()


class Schedule:
    """How many updates a run makes, and the learning rate of each.

    Epochs are counted in the updates that the run does make: one that is resumed with other workers
    keeps the number of micro-batches of an update, and another --accumulate changes it from there.
    """

    def __init__(
        self, optimizer: FinetuningOptimizerSettings, batches_per_epoch: int, micro_batches: int
    ) -> None:
        self._optimizer, self._batches_per_epoch = optimizer, batches_per_epoch
        self.load_state({"step": 0, "position": 0, "micro_batches": micro_batches})

    def load_state(self, state: JSONMapping) -> None:
        """Count the updates that follow a state of the loop."""
        optimizer = self._optimizer
        self.max_steps = optimizer.training_steps or self._last_of(optimizer.epochs, state)
        ramp = optimizer.ramp_up_epochs
        self._ramp_steps = self._last_of(ramp, state) if ramp else self.max_steps

    def _last_of(self, epochs: int, state: JSONMapping) -> int:
        """Return the last update of so many epochs; that of the state when they are over."""
        batches = max(0, epochs * self._batches_per_epoch - state["position"])
        whole, rest = divmod(batches, self._batches_per_epoch)
        per_epoch, in_rest = (
            -(-number // state["micro_batches"]) for number in (self._batches_per_epoch, rest)
        )
        return int(state["step"]) + whole * per_epoch + in_rest

    def rate(self, step: int) -> float:
        """Return the learning rate of update `step` (1-based)."""
        return learning_rate(step, self._optimizer, self._ramp_steps)


@dataclass(frozen=True)
class _Resumable:
    """What follows a checkpoint besides the loop itself."""

    history: History
    schedule: Schedule

    def state(self) -> JSONObject:
        return self.history.state()

    def load_state(self, state: JSONMapping) -> None:
        self.history.load_state(state)
        self.schedule.load_state(state)


@dataclass(frozen=True)
class FineTuning:
    """One run of fine-tuning."""

    loop: Loop
    classifier: Classifier
    data: TaskData
    history: History

    @property
    def epoch(self) -> float:
        """Return how many passes over the training set have been made."""
        return self.loop.progress.batches / self.loop.job.stream.source.batches_per_epoch


class ClassificationStep:
    """Forward and backward pass of a classifier."""

    metric_names = ("loss", "accuracy")

    def __init__(self, network: Block, kind: str, batches_per_epoch: int) -> None:
        self._network, self._kind = network, kind
        self._batches_per_epoch = batches_per_epoch
        # Rows of the word embeddings whose gradient is not zero; None: unknown.
        self._rows: list[NDArray] | None = None

    def to_device(self, batch: ClassifierBatch, device: Context) -> DeviceBatch:
        """Copy a micro-batch to a device."""
        return to_device(batch, device)

    def __call__(self, batch: DeviceBatch, scale: float, timer: PhaseTimer) -> NDArray:
        """Add the gradients of a micro-batch; returns the sums [2] over its examples."""
        with timer("model"):
            embeddings = SparseEmbeddingGrad(
                self._network.bort, batch.host_ids, batch.input_ids.context
            )
            with autograd.record():
                logits = forward(self._network, batch, self._kind, embeddings)
                loss = classification_loss(logits, batch.labels, self._kind).sum()
                scaled = loss if scale == 1.0 else loss * scale
            embeddings.backward(scaled)
            if self._rows is not None:
                self._rows.append(embeddings.rows)
            correct = (logits.argmax(axis=-1) == batch.labels).sum()
            return nd.concat(loss, correct, dim=0)

    def clear_embeddings(self, alone: bool) -> None:
        """Zero the gradient of the word embeddings, to which backward passes add rows.

        `alone`: no other worker has added rows to it. Then those of the last update are enough: to
        fill the whole with zeros costs 14 ms with 50,265 tokens (RESULTS.md).
        """
        weight = self._network.bort.word_embed[0].weight
        if self._rows is None or not alone:
            weight.zero_grad()
        else:
            for rows in self._rows:
                weight.grad(rows.context)[rows] = 0
        self._rows = []

    def metrics(self, means: Metrics, progress: Progress) -> Metrics:
        """Return what a metric line reports, from the means of an interval by name."""
        shown = {"epoch": round(progress.batches / self._batches_per_epoch, 3), **means}
        if self._kind == TaskKind.REGRESSION:
            del shown["accuracy"]
        return shown


class DevEvaluation:
    """Evaluates the dev sets of a task, and decides on early stopping."""

    def __init__(
        self,
        classifier: Classifier,
        data: TaskData,
        sources: Mapping[str, ClassifierLoader],
        communicator: Communicator,
        device: Context,
    ) -> None:
        self._classifier, self._data, self._sources = classifier, data, sources
        self._communicator, self._device = communicator, device

    def __call__(self, stop_requested: StopRequested = lambda: False) -> Metrics:
        """Return the metrics of each dev set, and `score`, their mean over the sets.

        Of a model whose logits are NaN or infinite: only `nonfinite_logits`, their number. Raises
        `Interrupted` when `stop_requested` on any rank.
        """
        task, metrics, scores = self._data.task, {}, []
        for name, source in self._sources.items():
            logits = predict_logits(
                self._classifier.network,
                source,
                task.kind,
                self._device,
                self._communicator,
                stop_requested,
            )
            if not np.isfinite(logits).all():
                return {"nonfinite_logits": float(np.sum(~np.isfinite(logits)))}
            values = task.metrics(self._data.dev[name], logits)
            scores.append(task.score(values))
            metrics.update({self._key(name, metric): v for metric, v in values.items()})
        return {**metrics, "score": float(np.mean(scores))}

    def _key(self, split: str, metric: str) -> str:
        return metric if len(self._sources) == 1 else f"{split}/{metric}"

    def patience_is_over(self, entries: Sequence[JSONMapping], patience: int | None) -> bool:
        """Return whether the last `patience` evaluations were no better than one before."""
        if not patience or not entries:
            return False
        names = [self._key(split, self._data.task.early_stop) for split in self._sources]
        watched = [
            float(np.mean([entry.get(name, -np.inf) for name in names])) for entry in entries
        ]
        return len(watched) - 1 - watched.index(max(watched)) >= patience


@dataclass(frozen=True)
class FinetuningOptions:
    """Settings of a fine-tuning run besides its classifier, its data and its optimizer."""

    folder: str
    max_len: int
    cache_dir: str
    seed: int = 0
    log_interval: int = 10
    ckpt_interval: Optional[int] = None  # updates; None: one at the end of each epoch
    resume: bool = False
    config: JSONMapping = field(default_factory=dict)  # written into config.json


def finetuning_loop(
    classifier: Classifier,
    data: TaskData,
    optimizer: FinetuningOptimizerSettings,
    options: FinetuningOptions,
    communicator: Communicator,
    devices: Sequence[Context],
    reporter: Reporter,
) -> FineTuning:
    """Encode the data of a run and return it, ready to start."""

    def source(examples: Sequence[Example], batch_size: int, seed: int | None) -> ClassifierLoader:
        tokenizer = classifier.tokenizer
        encoded = encode_examples(
            examples, tokenizer, options.max_len, options.cache_dir, communicator
        )
        return ClassifierLoader(encoded, batch_size, optimizer.num_buckets, tokenizer.pad_id, seed)

    training = source(data.train, optimizer.batch_size, options.seed)
    dev = {name: source(rows, optimizer.dev_batch_size, None) for name, rows in data.dev.items()}
    per_update = optimizer.accumulate * communicator.size * len(devices)
    schedule = Schedule(optimizer, training.batches_per_epoch, per_update)
    history = History()
    network, model_config = classifier.network, classifier.model_config
    evaluation = DevEvaluation(classifier, data, dev, communicator, devices[0])
    step = ClassificationStep(network, data.task.kind, training.batches_per_epoch)
    alone = communicator.size * len(devices) == 1
    job = Job(
        title=f"{model_config.model} on {model_config.task}, {len(data.train):,} examples",
        network=network,
        # The last update of an epoch may have fewer micro-batches: none mixes two epochs.
        stream=Stream(training, options.seed, whole_epochs=True),
        step=step,
        learning_rate=schedule.rate,
        max_steps=lambda: schedule.max_steps,
        evaluation=_evaluation(
            classifier, evaluation, history, training, optimizer, options, schedule
        ),
        saving=_save_policy(classifier, data, training, options, optimizer.accumulate),
        extra=_Resumable(history, schedule),
        # Without a decoder no backward pass overwrites it: the rows of the batches are added.
        clear_added=partial(step.clear_embeddings, alone),
    )
    loop = Loop(
        job,
        make_trainer(network, communicator, optimizer),
        communicator,
        devices,
        reporter,
        accumulate=optimizer.accumulate,
        log_interval=options.log_interval,
        on_nonfinite=optimizer.on_nonfinite,
    )
    return FineTuning(loop, classifier, data, history)


def learning_rate(step: int, optimizer: FinetuningOptimizerSettings, schedule_steps: int) -> float:
    """Return the rate of update `step` (1-based): warmup, linear decay, then a small constant.

    The bias of Adam's means, which start at zero, is corrected by a factor on the rate (Kingma and
    Ba 2015, section 2), so on the weight decay too.
    """
    rate = lowest = min(LOWEST_RATE, optimizer.lr)
    if step <= schedule_steps:
        warmup = int(schedule_steps * optimizer.warmup_ratio)
        rate = max(linear_warmup_decay(step, optimizer.lr, warmup, schedule_steps), lowest)
    return rate * bias_correction(step) if optimizer.bias_correction else rate


def _evaluation(
    classifier: Classifier,
    evaluation: DevEvaluation,
    history: History,
    training: ClassifierLoader,
    optimizer: FinetuningOptimizerSettings,
    options: FinetuningOptions,
    schedule: Schedule,
) -> Evaluation:
    def due(progress: Progress) -> bool:
        epoch_ended = progress.batches % training.batches_per_epoch == 0
        return progress.step > 0 and (epoch_ended or progress.step == schedule.max_steps)

    def record(progress: Progress, metrics: Metrics, write_best: bool) -> None:
        epoch = round(progress.batches / training.batches_per_epoch, 3)
        history.entries.append({"epoch": epoch, "step": progress.step, **metrics})
        if write_best:
            model_config = classifier.model_config
            details = {**model_config.details, "metrics": history.entries[-1]}
            best = dataclasses.replace(model_config, details=details)
            path = os.path.join(options.folder, BEST)
            save_model(path, classifier.network, best, classifier.tokenizer)

    return Evaluation(
        due=due,
        run=evaluation,
        score=lambda metrics: metrics.get("score", -np.inf),
        record=record,
        stop_early=lambda: evaluation.patience_is_over(history.entries, optimizer.early_stop),
    )


def _save_policy(
    classifier: Classifier,
    data: TaskData,
    training: ClassifierLoader,
    options: FinetuningOptions,
    accumulate: int,
) -> SavePolicy:
    model_config, interval = classifier.model_config, options.ckpt_interval

    def due(progress: Progress, best: bool) -> bool:
        if interval:
            return progress.step % interval == 0
        return progress.batches % training.batches_per_epoch == 0

    identity = {
        "model": model_config.model,
        "task": model_config.task,
        "vocab_size": model_config.vocab_size,
        "tokenizer_fingerprint": model_config.tokenizer_fingerprint,
        "examples": len(data.train),
        "batches_per_epoch": training.batches_per_epoch,
        SETS: sets_sha256(data),
    }
    return SavePolicy(
        folder=options.folder,
        due=due,
        write_model=lambda path, _: save_model(
            path, classifier.network, model_config, classifier.tokenizer
        ),
        write_config=lambda path, _: save_model_config(path, model_config, None),
        identity=identity,
        check_resume=lambda state: check_resume(
            options.folder, identity, options.config, accumulate, state
        ),
        settings=options.config,
        resume=options.resume,
    )


def check_resume(
    folder: str,
    identity: JSONMapping,
    config: JSONMapping,
    accumulate: int,
    state: JSONMapping,
) -> Resumed:
    """Compare the settings of a run with those of the checkpoint it resumes.

    Raises `UserError` when the micro-batches are not those that the checkpoint counts, its arrays
    would not fit, or its evaluations are of other rows.
    """
    for concern, flag in ((each, flag) for each, flags in FIXED_FLAGS.items() for flag in flags):
        # A flag that the checkpoint does not know had its default.
        then, now = (
            each.get(concern.__name__, {}).get(flag, getattr(concern, flag))
            for each in (state["settings"], config)
        )
        same = same_value(flag, then, now)
        if flag == "dtype":
            same = stored_dtype(then) == stored_dtype(now)
        if not same:
            raise UserError(
                f"--{flag} {now}: the checkpoint was made with {then}; give that, or another "
                "--output_dir"
            )
    for name, value in identity.items():
        if name != SETS and state.get(name) != value:
            raise UserError(
                f"--resume: the checkpoint in {folder} is of a run with {name} {state.get(name)}, "
                f"now {value}; give what it was made with, or another --output_dir"
            )
    sets = state.get(SETS, identity[SETS])  # checkpoints of earlier versions have none
    changed = [name for name, sha256 in identity[SETS].items() if sets.get(name) != sha256]
    if changed:
        raise UserError(
            f"--resume: the checkpoint in {folder} is of a run with other rows in "
            f"{' and '.join(changed)}; restore them, or give another --output_dir"
        )
    _warn_of_changes(config, state["settings"])
    recorded = state["settings"].get("FinetuningOptimizerSettings", {})
    best_counts = _is_best_of(os.path.join(folder, BEST), state["best_step"])
    return Resumed(recorded.get("accumulate", accumulate), best_counts)


def _warn_of_changes(config: JSONMapping, then: JSONMapping) -> None:
    """Name the flags of the training that differ from those of a checkpoint."""
    warn_of(
        [
            f"--{flag}"
            for concern in (ClassifierSettings, FinetuningOptimizerSettings)
            for flag, value in config.get(concern.__name__, {}).items()
            if flag not in UNREMARKABLE_FLAGS
            # A flag that the checkpoint does not know had its default.
            and not same_value(
                flag, then.get(concern.__name__, {}).get(flag, getattr(concern, flag)), value
            )
        ]
    )


def _is_best_of(path: str, step: Optional[int]) -> bool:
    """Return whether the best model is still that of a step.

    An evaluation after the checkpoint may have replaced it, and under changed flags the resumed run
    need not come to that model again.
    """
    if step is None:
        return True
    try:
        metrics = read_model_config(path).details.get("metrics", {})
    except UserError:  # missing or damaged
        return False
    return bool(metrics.get("step", step) == step)


# ---- from flags to a run ------------------------------------------------------------------------


def finetune(settings: FinetuningSettings, communicator: Communicator) -> JSONObject:
    """Fine-tune or predict; returns the content of metrics.json.

    All sets are read before the first step. Raises `UserError` for what the user can fix.
    """
    settings.check()
    run = settings.run
    devices = devices_of(run.gpus, run.cpu_contexts, communicator)
    resolve_dtype(settings.optimizer.dtype, devices)
    task = task_of(settings)
    folder = os.path.join(run.output_dir, task.name)
    if run.only_inference:
        return infer(settings, communicator, devices, task)
    has_finished = run.resume and os.path.exists(os.path.join(folder, METRICS))
    if communicator.broadcast_object(has_finished):  # other machines need not have the folder
        found = finished_run(folder, settings) if communicator.rank == 0 else {}
        return communicator.broadcast_object(found)
    checkpoint.require_usable(folder, "--output_dir")
    refuse_other_config(folder, "--output_dir", {FinetuningRunSettings.__name__})
    data, rows = read_task_data(task, settings.task, run.seed)
    sets = read_prediction_sets(task, settings.task, run.output_dir)
    classifier = build_classifier(settings, task, devices, communicator.size)
    with lock_of_rank_0(folder, "--output_dir", communicator), memory_errors(MEMORY_CURE):
        if communicator.rank == 0 and not run.resume:
            refuse_other_run(folder)
            refuse_other_tokenizer(classifier.tokenizer, folder, "--output_dir")
        training = finetuning_run(settings, classifier, data, communicator, devices)
        training.loop.run()
        return conclude(training, rows, sets, scoring_of(settings, communicator, devices))


def finished_run(folder: str, settings: FinetuningSettings) -> JSONObject:
    """Return the content of a finished run's metrics.json.

    Raises `UserError` when it was made with other flags that decide its result: it has left no
    checkpoint to continue from.
    """
    before = read_json_as(os.path.join(folder, "config.json"), dict[str, JSONObject])
    changed = []
    for part in settings:
        recorded = before.get(type(part).__name__, {})
        for flag in dataclasses.fields(part):
            # A flag that the file does not know had its default.
            then, now = recorded.get(flag.name, flag.default), getattr(part, flag.name)
            if flag.name not in IRRELEVANT_FLAGS and not same_value(flag.name, then, now):
                changed.append(f"--{flag.name} {then}, not {now}")
    if changed:
        raise UserError(
            f"{folder}: the run there has finished, with {'; '.join(changed)}; a finished run "
            "cannot be continued, name another --output_dir"
        )
    path = os.path.join(folder, METRICS)
    if checkpoint.steps(folder):  # it was killed at its very end
        with lock_folder(folder, "--output_dir"):
            checkpoint.remove_all(folder)
    print(f"{path}: the run has finished, nothing to do")
    try:
        return read_json_as(path, JSONObject)
    except UserError as error:
        raise UserError(f"{error}; delete the file to repeat the run") from None


# They change where a run is, what it prints and how it is computed, not what comes out. The folder
# is that of the task, however its name is spelled.
IRRELEVANT_FLAGS = {
    *("task_name", "cache_dir", "output_dir", "resume", "log_interval", "ckpt_interval"),
    *("gpus", "cpu_contexts", "dev_batch_size", "skip_bad_rows", "on_nonfinite"),
}
# What a resumed run may change without a warning.
UNREMARKABLE_FLAGS = {
    *IRRELEVANT_FLAGS,
    *("epochs", "training_steps", "accumulate", "dtype", "model_name"),
}


def finetuning_run(
    settings: FinetuningSettings,
    classifier: Classifier,
    data: TaskData,
    communicator: Communicator,
    devices: Sequence[Context],
) -> FineTuning:
    """Return the run of the flags, in the folder of its task, ready to start."""
    run = settings.run
    options = FinetuningOptions(
        os.path.join(run.output_dir, data.task.name),
        settings.task.max_len,
        settings.task.cache_dir,
        run.seed,
        run.log_interval,
        run.ckpt_interval,
        run.resume,
        as_dict(*settings),
    )
    reporter = FolderReporter(options.folder, communicator)
    return finetuning_loop(
        classifier, data, settings.optimizer, options, communicator, devices, reporter
    )


def scoring_of(
    settings: FinetuningSettings, communicator: Communicator, devices: Sequence[Context]
) -> Scoring:
    """Return how the sets of a task are scored."""
    optimizer, cache_dir = settings.optimizer, settings.task.cache_dir
    return Scoring(
        optimizer.dev_batch_size, optimizer.num_buckets, cache_dir, devices[0], communicator
    )


def infer(
    settings: FinetuningSettings,
    communicator: Communicator,
    devices: Sequence[Context],
    task: Task,
) -> JSONObject:
    """Evaluate and predict once with a fine-tuned classifier."""
    require_writable(settings.run.output_dir, "--output_dir")
    sets = read_prediction_sets(task, settings.task, settings.run.output_dir)
    if not sets:
        raise UserError(
            f"{task.name}: neither a dev nor a test set; name their folder with --data_dir; "
            f"{task.searched(settings.task.data_dir, (*task.dev, *task.test))}"
        )
    classifier = build_classifier(settings, task, devices, communicator.size)
    own = classifier.model_config.task
    if own and own not in (task.name, task.model_task):  # another program's has none
        raise UserError(
            f"--model_parameters {settings.classifier.model_parameters}: a model of {own}; give "
            f"one of {task.model_task or task.name}"
        )
    folder = os.path.join(settings.run.output_dir, task.name)
    with lock_of_rank_0(folder, "--output_dir", communicator), memory_errors(MEMORY_CURE):
        refuse_answers_of_another(settings, task)
        scoring = scoring_of(settings, communicator, devices)
        results = predict_sets(classifier, task, sets, scoring, settings.run.output_dir)
    if communicator.rank == 0:
        print("\n".join([task.name, *prediction_lines(results, {})]))
    return results


def refuse_answers_of_another(settings: FinetuningSettings, task: Task) -> None:
    """Raise `UserError` when predictions would replace those of a run with another model.

    A run that has not finished will write them; its model is any of its checkpoints till then.
    """
    model = os.path.realpath(parameter_file(str(settings.classifier.model_parameters)))
    for name in filter(None, (task.name, task.model_task)):
        folder = os.path.join(settings.run.output_dir, name)
        is_run = any(
            os.path.exists(os.path.join(folder, file)) for file in (METRICS, "config.json")
        )
        own = model == os.path.realpath(os.path.join(folder, BEST))
        if not os.path.exists(os.path.join(folder, METRICS)):
            own = own or model.startswith(os.path.join(os.path.realpath(folder), "step-"))
        if is_run and not own:
            raise UserError(
                f"{folder}: has a run with another model than {model}, whose predictions would "
                "be replaced; name another --output_dir"
            )


def refuse_other_run(folder: str) -> None:
    """Raise `UserError` when the folder holds another run's results or checkpoints."""
    # Of a sweep, all runs but the best keep their results without their weights.
    results = any(os.path.exists(os.path.join(folder, name)) for name in (BEST, METRICS))
    if results or checkpoint.steps(folder):
        raise UserError(
            f"{folder}: has another run; --resume continues it, or name another --output_dir"
        )


# ---- the results of a run ------------------------------------------------------------------------


def conclude(
    run: FineTuning, rows: JSONObject, sets: Sequence[PredictionSet], scoring: Scoring
) -> JSONObject:
    """Write the predictions of the best model and metrics.json; returns the metrics."""
    loop, data, folder = run.loop, run.data, run.loop.job.saving.folder
    seconds = run.history.seconds  # of the training: the predictions below do not count
    best_step = loop.progress.best_step
    if best_step is None:
        raise UserError(f"{folder}: no evaluation gave a score; lower --lr")
    is_first = loop.communicator.rank == 0
    if is_first:
        load_parameters(run.classifier.network, os.path.join(folder, BEST))
    loop.communicator.broadcast(loop.parameters())
    bfloat16.refresh(run.classifier.network.collect_params().values())
    answers = predict_sets(run.classifier, data.task, sets, scoring, os.path.dirname(folder))
    metrics = {
        "task": data.task.name,
        "model": run.classifier.model_config.model,
        **rows,
        "train_examples": len(data.train),
        "steps": loop.progress.step,
        "best": next(entry for entry in run.history.entries if entry["step"] == best_step),
        "baseline": {
            name: baseline(data.task, data.train, examples) for name, examples in data.dev.items()
        },
        "answers": answers,
        "history": run.history.entries,
        "seconds": round(seconds, 1),
        "examples_per_second": round(run.epoch * len(data.train) / seconds, 1),
    }
    if is_first:
        write_json(os.path.join(folder, METRICS), metrics)
        checkpoint.remove_all(folder)
        print(summary(metrics), flush=True)
    loop.communicator.barrier()
    return metrics


def summary(metrics: JSONObject) -> str:
    """Format the summary of a run."""
    best = metrics["best"]
    first = (
        f"{metrics['task']}: best of {len(metrics['history'])} evaluations at epoch "
        f"{best['epoch']:g} (step {best['step']})"
    )
    last = f"  {metrics['seconds']:,} s, {metrics['examples_per_second']:,} examples/s"
    sets = prediction_lines(metrics["answers"], metrics["baseline"])
    # Those of the dev sets are said below each of them.
    said = {message for answers in metrics["answers"].values() for message in answers["skipped"]}
    train = [message for message in metrics["skipped"] if message not in said]
    return "\n".join([first, *skipped_lines(train), *sets, last])
