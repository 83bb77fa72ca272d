"""A pretraining run: masked language modelling, with or without a teacher."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import mxnet as mx
import numpy as np
from mxnet import autograd, nd

from bort import checkpoint
from bort.bort import SparseEmbeddingGrad, get_bort_model, options_of, set_dtype
from bort.communicator import Communicator, lock_of_rank_0
from bort.config import as_dict, command_of
from bort.devices import devices_of, memory_errors, resolve_dtype, stored_dtype
from bort.errors import UserError
from bort.files import MODEL_BYTES, sha256_of
from bort.parameters import load_parameters, parameter_file
from bort.pretraining.config import (
    SETTINGS_CLASSES,
    DataSettings,
    LossSettings,
    PretrainingSettings,
    StudentSettings,
    TeacherSettings,
)
from bort.pretraining.distillation import correct_predictions, distillation_loss, squared_distance
from bort.pretraining.evaluation import evaluate
from bort.pretraining.mlm import DeviceBatch, masked_logits, to_device
from bort.pretraining.teacher import (
    LiveTeacher,
    OpenVinoTeacher,
    Teacher,
    load_teacher,
    require_openvino,
    require_same_tokenizer,
    require_shape,
    round_teacher,
)
from bort.pretraining.teacher_cache import CachedTeacher, open_rows, read_cache_manifest
from bort.reporter import FolderReporter, Reporter
from bort.resume import changed_flags, refuse_other_config, same_value, warn_of
from bort.saved_model import (
    MASKED_LM,
    ModelConfig,
    body_options_of,
    save_model,
    save_model_config,
)
from bort.seeds import mxnet_seed
from bort.shapes import BORT_OPTIONS, MAX_LENGTH
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
from bort.training.optimization import linear_warmup_decay, make_trainer
from bort.training.reporting import PhaseTimer
from bort.types import Block, Context, JSONMapping, NDArray
from data.batches import Batch, BucketSampler, PretrainingLoader, open_dynamic_masking
from data.shards import Manifest, ShardSet, open_shards, shards_tokenizer

MEMORY_CURE = (
    "lower --batch_size and raise --accumulate by the same factor, or make the shards with a "
    "smaller --max_seq_length"
)
# What a resumed run cannot change. The micro-batch of a number depends on the first and the last.
FIXED_FLAGS = {
    "DataSettings": ("batch_size", "num_buckets", "use_avg_len", "dynamic_masking"),
    "StudentSettings": ("student_model", "student_parameters"),
    "OptimizerSettings": ("optimizer", "dtype"),
    "RunSettings": ("seed",),
}
# What a resumed run may change without a word: how far, where and how it runs, and what is said of
# it elsewhere.
UNREMARKABLE_FLAGS = {
    *("data", "data_eval", "batch_size_eval", "accumulate", "no_verify", "num_steps"),
    *("dtype", "teacher_dtype", "teacher_runtime", "compression", "on_nonfinite"),
    *("log_teacher_mse", "log_interval", "ckpt_interval", "keep_checkpoints", "eval_interval"),
    *("ckpt_dir", "resume", "start_step", "gpus", "cpu_contexts", "check"),
}


def pretrain(settings: PretrainingSettings, communicator: Communicator) -> list[Metrics]:
    """Train as the flags say; returns the held-out evaluations, the first before training.

    Rank 0 holds the lock of the run's folder. Raises `UserError` when another process writes there.
    """
    devices = checked_devices(settings, communicator)
    lock = lock_of_rank_0(settings.run.ckpt_dir, "--ckpt_dir", communicator)
    with lock, memory_errors(MEMORY_CURE):
        reporter = FolderReporter(settings.run.ckpt_dir, communicator)
        return pretraining_loop(settings, communicator, devices, reporter).run()


def checked_devices(settings: PretrainingSettings, communicator: Communicator) -> list[Context]:
    """Return the devices of a run.

    Raises `UserError` for devices, flags and a folder that a run cannot have, before anything is
    loaded.
    """
    settings.check()
    run = settings.run
    devices = devices_of(run.gpus, run.cpu_contexts, communicator)
    resolve_dtype(settings.optimizer.dtype, devices)
    resolve_dtype(settings.teacher.teacher_dtype, devices, "--teacher_dtype")
    if settings.teacher.teacher_runtime == "openvino":
        require_openvino(devices)
    checkpoint.require_usable(run.ckpt_dir, "--ckpt_dir")
    refuse_other_config(run.ckpt_dir, "--ckpt_dir", {each.__name__ for each in SETTINGS_CLASSES})
    return devices


def pretraining_loop(
    settings: PretrainingSettings,
    communicator: Communicator,
    devices: Sequence[Context],
    reporter: Reporter,
) -> Loop:
    """Build student, teacher and data of a run that is ready to start."""
    data, optimizer, run = settings.data, settings.optimizer, settings.run
    inputs = open_data(data, run.seed, settings.teacher.teacher_cache)
    dtype = resolve_dtype(optimizer.dtype, devices)
    student = build_student(settings.student, inputs.manifest, run.seed, dtype, devices)
    teacher = build_teacher(settings.teacher, inputs.manifest, dtype, devices)
    notes = []
    if teacher and settings.teacher.teacher_dtype == "bfloat16":
        notes.append(round_teacher(teacher, inputs.training, devices[0]))
    low = ", products in bfloat16" if dtype == "bfloat16" else ""
    sequences = inputs.manifest.totals["sequences"]
    job = Job(
        title=f"{settings.student.student_model} on {sequences:,} sequences{low}",
        network=student,
        stream=Stream(inputs.training, run.seed),
        step=DistillationStep(student, teacher, settings.loss),
        learning_rate=lambda step: linear_warmup_decay(
            step, optimizer.lr, optimizer.warmup_steps, optimizer.num_steps
        ),
        max_steps=lambda: optimizer.num_steps,
        evaluation=_evaluation(settings, inputs.held_out, student, teacher, communicator, devices),
        saving=_save_policy(settings, inputs, student, communicator.size),
        notes=notes,
    )
    return Loop(
        job,
        make_trainer(student, communicator, optimizer, optimizer.sgd_bound),
        communicator,
        devices,
        reporter,
        accumulate=data.accumulate,
        log_interval=run.log_interval,
        on_nonfinite=optimizer.on_nonfinite,
    )


class DistillationStep:
    """Forward and backward pass of the student, with the logits of its teacher if it has one."""

    # Summed over masked positions.
    metric_names = ("loss", "mlm_loss", "kl", "accuracy", "teacher_mse")

    def __init__(self, student: Block, teacher: Teacher | None, loss: LossSettings) -> None:
        self.student, self.teacher = student, teacher
        self._loss = loss

    def to_device(self, batch: Batch, device: Context) -> DeviceBatch:
        """Copy a micro-batch to a device."""
        return to_device(batch, device)

    def __call__(self, batch: DeviceBatch, scale: float, timer: PhaseTimer) -> NDArray:
        """Add the gradients of a micro-batch; returns the sums [5] over its masked positions."""
        teacher_logits = None
        if self.teacher is not None:
            with timer("teacher"):
                teacher_logits = self.teacher.logits(batch)
        with timer("student"):
            device = batch.input_ids.context
            embeddings = SparseEmbeddingGrad(self.student, batch.host_ids, device)
            with autograd.record():
                logits = masked_logits(self.student, batch, embeddings)
            *sums, gradient = distillation_loss(
                logits,
                batch.labels,
                teacher_logits,
                self._loss.mlm_weight,
                self._loss.teacher_ce_weight,
                self._loss.distillation_temperature,
            )
            embeddings.backward(logits, gradient if scale == 1.0 else gradient * scale)
            correct = correct_predictions(logits, batch.labels)
            square = nd.zeros_like(correct)
            if self._loss.log_teacher_mse and teacher_logits is not None:
                square = squared_distance(logits, teacher_logits).sum()
            return nd.concat(*sums, correct, square, dim=0)

    def metrics(self, means: Metrics, progress: Progress) -> Metrics:
        """Return what a metric line reports, from the means of an interval by name."""
        shown = dict(means)
        if self.teacher is None:
            del shown["kl"]
        if not self._loss.log_teacher_mse:
            del shown["teacher_mse"]
        return shown


def _evaluation(
    settings: PretrainingSettings,
    held_out: PretrainingLoader | None,
    student: Block,
    teacher: Teacher | None,
    communicator: Communicator,
    devices: Sequence[Context],
) -> Evaluation:
    interval, max_steps = settings.run.eval_interval, settings.optimizer.num_steps
    temperature = settings.loss.distillation_temperature

    def run(stop_requested: StopRequested) -> Metrics:
        if held_out is None:
            return {}
        return evaluate(
            student, teacher, held_out, temperature, communicator, devices[0], stop_requested
        )

    return Evaluation(
        due=lambda progress: progress.step % interval == 0 or progress.step == max_steps,
        run=run,
        score=lambda metrics: -metrics["mlm_loss"],
    )


def _save_policy(
    settings: PretrainingSettings, inputs: Inputs, student: Block, processes: int
) -> SavePolicy:
    run, max_steps, manifest = settings.run, settings.optimizer.num_steps, inputs.manifest
    tokenizer = shards_tokenizer(settings.data.data, manifest)
    program = f"run_pretraining_distillation{'_hvd' * (processes > 1)}.py"

    def due(progress: Progress, best: bool) -> bool:
        return best or progress.step % run.ckpt_interval == 0 or progress.step == max_steps

    def model_config(progress: Progress) -> ModelConfig:
        passes = progress.batches / inputs.training.batches_per_epoch
        details = {
            "step": progress.step,
            "tokens seen": f"{round(passes * manifest.totals['tokens']):,}",
            "passes over the data": f"{passes:.3g}",
            "data": settings.data.data,
            "command": command_of(program, *settings, processes=processes),
        }
        if progress.best_step is not None:
            details["metrics"] = {"lowest held-out mlm_loss": -progress.best_score}
        return ModelConfig(
            model=settings.student.student_model,
            vocab_size=manifest.vocab_size,
            tokenizer_fingerprint=manifest.tokenizer_fingerprint,
            kind=MASKED_LM,
            max_len=student.encoder._max_length,
            **options_of(student)._asdict(),
            details=details,
        )

    def write_model(path: str, progress: Progress) -> None:
        save_model(path, student, model_config(progress), tokenizer)

    teacher = teacher_sha256(settings.teacher)
    identity = {
        "model": settings.student.student_model,
        "vocab_size": manifest.vocab_size,
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "shards_sha256": shards_sha256(manifest),
        "held_out_sha256": inputs.held_out_sha256,
        "teacher_sha256": teacher,
    }

    def resume(state: JSONMapping) -> Resumed:
        if inputs.held_out is None:  # what the best score that is kept was measured on
            identity["held_out_sha256"] = state.get("held_out_sha256")
        return check_resume(settings, inputs, state, teacher)

    return SavePolicy(
        folder=run.ckpt_dir,
        due=due,
        write_model=write_model,
        write_config=lambda path, progress: save_model_config(path, model_config(progress), None),
        identity=identity,
        check_resume=resume,
        settings=as_dict(*settings),
        keep=run.keep_checkpoints,
        resume=run.resume,
        start_step=run.start_step,
    )


def check_resume(
    settings: PretrainingSettings,
    inputs: Inputs,
    state: JSONMapping,
    teacher: Optional[str] = None,
) -> Resumed:
    """Compare the settings of a run with those of the checkpoint it resumes.

    teacher: see `teacher_sha256`.

    Most flags may change. Raises `UserError` for those that may not: the micro-batches would not be
    those that the checkpoint counts, or its arrays would not fit.
    """
    cure = "give what it was made with, or start a new run with --student_parameters"
    if shards_sha256(inputs.manifest) != state.get("shards_sha256"):
        raise UserError(f"--data {settings.data.data}: not the checkpoint's shards; {cure}")
    now, then = as_dict(*settings), state["settings"]
    for concern, flags in FIXED_FLAGS.items():
        for flag in flags:
            given = now[concern][flag]
            # A flag that the checkpoint does not know had its default.
            made_with = then.get(concern, {}).get(flag, _default(concern, flag))
            same = same_value(flag, made_with, given)
            if flag == "dtype":
                same = stored_dtype(given) == stored_dtype(made_with)
            if not same:
                raise UserError(
                    f"--{flag} {given}: the checkpoint was made with {made_with}; {cure}"
                )
    _warn_of_changes(settings, then)
    _warn_of_teacher(settings.teacher, then, state.get("teacher_sha256"), teacher)
    data = then.get("DataSettings", {})
    if inputs.held_out is None:  # nothing replaces the best checkpoint
        best_counts = True
    elif "held_out_sha256" in state:
        best_counts = state["held_out_sha256"] == inputs.held_out_sha256
    else:
        best_counts = data.get("data_eval") == settings.data.data_eval
    if not best_counts and state["best_step"] is not None:
        print(
            f"warning: --data_eval {settings.data.data_eval}: not the held-out shards of the "
            "checkpoint; evaluations from now on do not compare with those before",
            file=sys.stderr,
        )
    best_counts = best_counts and _has_best(settings.run.ckpt_dir, state["best_step"])
    return Resumed(data.get("accumulate", settings.data.accumulate), best_counts)


def _has_best(folder: str, step: Optional[int]) -> bool:
    """Return whether the best checkpoint so far, if there is one, still is in the folder.

    A later one, which `--start_step` takes back, may have replaced it. Then the next evaluation is
    the best again: a score that no checkpoint has would keep the run without a best one.
    """
    if step is None or os.path.isdir(checkpoint.path_of(folder, step)):
        return True
    print(
        f"warning: {folder}: the best checkpoint, of step {step}, is gone; the best one of now on "
        "takes its place",
        file=sys.stderr,
    )
    return False


def _warn_of_changes(settings: PretrainingSettings, then: Mapping[str, JSONMapping]) -> None:
    """Name the flags of the loss and the schedule that differ from those of a checkpoint."""
    recorded = {flag: value for concern in then.values() for flag, value in concern.items()}
    warn_of(changed_flags(recorded, settings, UNREMARKABLE_FLAGS))


def _warn_of_teacher(
    teacher: TeacherSettings,
    then: Mapping[str, JSONMapping],
    before: Optional[str],
    now: Optional[str],
) -> None:
    """Say that the same flags name other weights: a teacher that is still training has new ones."""
    how = ("teacher_model", "teacher_dtype", "teacher_runtime")
    renamed = changed_flags(then.get("TeacherSettings", {}), [teacher], how)
    if before and now and before != now and not renamed:
        print(
            f"warning: {teacher.teacher_ckpt_dir or teacher.teacher_cache}: holds another teacher "
            "than the checkpoint was trained with; continuing with this one",
            file=sys.stderr,
        )


def _default(concern: str, flag: str) -> Any:
    settings_class = next(each for each in SETTINGS_CLASSES if each.__name__ == concern)
    return next(f.default for f in dataclasses.fields(settings_class) if f.name == flag)


def shards_sha256(manifest: Manifest) -> str:
    """Return one SHA-256 over those of all shards."""
    return hashlib.sha256(" ".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()


class Inputs(NamedTuple):
    """The data of a run."""

    training: PretrainingLoader
    held_out: Optional[PretrainingLoader]
    manifest: Manifest  # of the training shards
    held_out_sha256: Optional[str] = None  # over the held-out shards


def open_data(data: DataSettings, seed: int, teacher_cache: str | None = None) -> Inputs:
    """Open the training and held-out shards; raises `UserError` when their tokenizers differ."""
    if data.dynamic_masking and teacher_cache:
        raise UserError("--dynamic_masking: not with --teacher_cache, which has fixed masks only")
    shards = open_shards(data.data, verify=not data.no_verify)
    require_positions(shards, f"--data {data.data}")
    order = BucketSampler(shards.lengths, data.batch_size, data.num_buckets, data.use_avg_len, seed)
    masking = open_dynamic_masking(data.data, shards, seed) if data.dynamic_masking else None
    verify = not data.no_verify
    rows = open_rows(teacher_cache, shards, verify) if teacher_cache else None
    training = PretrainingLoader(shards, order, shards.manifest.pad_id, rows, masking)
    if not data.data_eval:
        return Inputs(training, None, shards.manifest)
    held_out = open_shards(data.data_eval, verify=not data.no_verify)
    require_positions(held_out, f"--data_eval {data.data_eval}")
    if held_out.manifest.tokenizer_fingerprint != shards.manifest.tokenizer_fingerprint:
        raise UserError(
            f"--data_eval {data.data_eval}: made with another tokenizer than --data {data.data}"
        )
    rows = open_rows(teacher_cache, held_out, verify) if teacher_cache else None
    evaluation = held_out_source(
        held_out, data.batch_size_eval, data.num_buckets, data.use_avg_len, rows
    )
    return Inputs(training, evaluation, shards.manifest, shards_sha256(held_out.manifest))


def require_positions(shards: ShardSet, named: str) -> None:
    """Raise `UserError` when sequences are longer than the models have positions."""
    longest = int(shards.lengths.max())
    if longest > MAX_LENGTH:
        raise UserError(
            f"{named}: holds sequences of {longest} tokens, but the models have {MAX_LENGTH} "
            f"positions; make the shards with --max_seq_length {MAX_LENGTH}"
        )


def held_out_source(
    shards: ShardSet,
    batch_size: int,
    num_buckets: int,
    use_avg_len: bool = False,
    teacher_rows: Sequence[np.ndarray] | None = None,
) -> PretrainingLoader:
    """Return the batches of held-out shards, in an order that is always the same."""
    order = BucketSampler(shards.lengths, batch_size, num_buckets, use_avg_len)
    return PretrainingLoader(shards, order, shards.manifest.pad_id, teacher_rows)


def build_student(
    student: StudentSettings, manifest: Manifest, seed: int, dtype: str, devices: Sequence[Context]
) -> Block:
    """Build the model that is trained, from random weights or those it is to start from."""
    path = parameter_file(student.student_parameters) if student.student_parameters else None
    if path:
        require_same_tokenizer(path, manifest.tokenizer_fingerprint)
        require_shape(path, "--student_model", student.student_model)
    mx.random.seed(mxnet_seed(seed))
    network, _ = get_bort_model(
        student.student_model,
        vocab=range(manifest.vocab_size),
        ctx=list(devices),
        dropout=student.dropout,
        options=body_options_of(path) if path else BORT_OPTIONS,
    )
    if path:
        load_parameters(network, path)
    set_dtype(network, dtype)
    network.encoder.hybridize(static_alloc=True)
    return network


def teacher_sha256(teacher: TeacherSettings) -> Optional[str]:
    """Return the SHA-256 of the teacher's weights, as the file or its cache has it; None: none."""
    if teacher.teacher_cache:
        return read_cache_manifest(teacher.teacher_cache).teacher_sha256
    if not teacher.teacher_ckpt_dir:
        return None
    return sha256_of(parameter_file(teacher.teacher_ckpt_dir), MODEL_BYTES)


def build_teacher(
    teacher: TeacherSettings, manifest: Manifest, dtype: str, devices: Sequence[Context]
) -> Teacher | None:
    """Load the teacher, or open the cache of one; None when there is neither."""
    if teacher.teacher_cache:
        return CachedTeacher(teacher.teacher_cache, devices)
    if not (teacher.teacher_model and teacher.teacher_ckpt_dir):
        return None
    network = load_teacher(
        teacher.teacher_model,
        teacher.teacher_ckpt_dir,
        manifest.vocab_size,
        manifest.tokenizer_fingerprint,
        devices,
    )
    if teacher.teacher_runtime == "openvino":
        return OpenVinoTeacher(network)
    network.cast(stored_dtype(dtype))
    return LiveTeacher(network)
