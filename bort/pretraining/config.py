"""The flags of pretraining: one frozen dataclass per concern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, NamedTuple, Optional

from bort.config import build, option, required
from bort.errors import UserError
from bort.shapes import MAX_BUCKETS
from bort.training.config import UpdateSettings


@dataclass(frozen=True)
class DataSettings:
    """Training data and batching."""

    data: str = required("folder of training shards, made by create_pretraining_data.py")
    data_eval: Optional[str] = option(None, "folder of held-out shards")
    batch_size: int = option(8, "sequences per micro-batch and worker", minimum=1)
    batch_size_eval: int = option(8, "sequences per batch of the evaluation", minimum=1)
    accumulate: int = option(1, "micro-batches per worker and update", minimum=1)
    num_buckets: int = option(
        10,
        "number of length buckets; a batch holds sequences of one bucket",
        minimum=1,
        maximum=MAX_BUCKETS,
    )
    use_avg_len: bool = option(False, "batch sizes count tokens instead of sequences")
    dynamic_masking: bool = option(
        False,
        "draw new masks in each epoch, as RoBERTa did, instead of using those of the shards; not "
        "with --teacher_cache",
    )
    no_verify: bool = option(
        False, "skip the check of SHA-256 and ids of shards and teacher cache at the start"
    )


@dataclass(frozen=True)
class StudentSettings:
    """Student model."""

    student_model: str = option(
        "bort_4_8_768_1024", "shape: bort_<layers>_<heads>_<intermediate>_<hidden>"
    )
    student_parameters: Optional[str] = option(
        None, "initial weights: a parameter file, a checkpoint or a run (default: random)"
    )
    dropout: float = option(0.1, "dropout rate while training", minimum=0.0, maximum=0.99)


@dataclass(frozen=True)
class TeacherSettings:
    """Teacher model; without one the loss is the masked-LM loss alone."""

    teacher_model: Optional[str] = option(
        None, "roberta_24_1024_16, roberta_12_768_12, or a shape as for --student_model"
    )
    teacher_ckpt_dir: Optional[str] = option(
        None, "the teacher's weights: a parameter file, a checkpoint, or a run's folder"
    )
    teacher_dtype: str = option(
        "float32",
        "precision of the teacher's matrix products on CPUs: float32, or bfloat16 where the "
        "processor has AVX512-BF16 or AMX; on GPUs the teacher has --dtype",
        choices=("float32", "bfloat16"),
    )
    teacher_runtime: str = option(
        "mxnet",
        "what runs the teacher on a CPU: mxnet, or openvino, which takes about two thirds of the "
        "time and needs the package openvino",
        choices=("mxnet", "openvino"),
    )
    teacher_cache: Optional[str] = option(
        None, "instead of the model: its stored outputs, made by scripts/build_teacher_cache.py"
    )

    def check(self) -> None:
        """Raise `UserError` when the flags do not name one teacher."""
        if self.teacher_cache and self.teacher_model:
            raise UserError("--teacher_cache replaces the teacher: leave --teacher_model out")
        if self.teacher_cache and self.teacher_runtime != "mxnet":
            raise UserError("--teacher_cache replaces the teacher: leave --teacher_runtime out")
        if self.teacher_model and not self.teacher_ckpt_dir:
            raise UserError(
                "--teacher_model needs --teacher_ckpt_dir: the teacher's weights are required"
            )
        if self.teacher_ckpt_dir and not self.teacher_model:
            raise UserError("--teacher_ckpt_dir needs --teacher_model, the shape of those weights")


@dataclass(frozen=True)
class LossSettings:
    """Loss: mlm_weight * cross-entropy + teacher_ce_weight * T^2 * KL(teacher/T || student/T)."""

    mlm_weight: float = option(0.1, "weight of the masked-LM cross-entropy", minimum=0.0)
    teacher_ce_weight: float = option(0.5, "weight of the distillation (KL) loss", minimum=0.0)
    distillation_temperature: float = option(
        2.0, "temperature T of both distributions", minimum=0.01
    )
    log_teacher_mse: bool = option(
        False, "also log the mean squared error between the two distributions (slower)"
    )


@dataclass(frozen=True)
class OptimizerSettings(UpdateSettings):
    """Optimizer and learning-rate schedule."""

    num_steps: int = option(1000, "updates to make", minimum=1)
    lr: float = option(1e-4, "peak learning rate", minimum=0.0)
    warmup_ratio: float = option(
        0.01,
        "fraction of the steps for linear warmup; then the rate decays linearly",
        minimum=0.0,
        maximum=1.0,
    )
    optimizer: str = option(
        "bertadam",
        "bertadam, or sgd: no moments, weights clipped to --weight_bound (for OSE)",
        choices=("bertadam", "sgd"),
    )
    weight_bound: float = option(
        1.0, "with sgd: the weights are clipped to [-weight_bound, weight_bound]", minimum=1e-9
    )

    @property
    def warmup_steps(self) -> int:
        """Return the number of warmup steps."""
        return int(self.num_steps * self.warmup_ratio)

    @property
    def sgd_bound(self) -> Optional[float]:
        """Return the bound on the weights under SGD; None under BERTAdam, which needs none."""
        return self.weight_bound if self.optimizer == "sgd" else None

    def check(self) -> None:
        """Raise `UserError` when the optimizer does not support the precision."""
        if self.optimizer == "sgd" and self.dtype == "float16":
            raise UserError("--dtype float16: --optimizer sgd updates float32 parameters only")


@dataclass(frozen=True)
class RunSettings:
    """Run: folder, checkpoints, log and devices."""

    ckpt_dir: str = option("runs/pretraining", "folder of checkpoints and metrics")
    ckpt_interval: int = option(1000, "updates between checkpoints", minimum=1)
    keep_checkpoints: int = option(3, "newest checkpoints to keep, besides the best", minimum=1)
    resume: bool = option(
        False, "resume from the latest valid checkpoint in --ckpt_dir", rerun=False
    )
    start_step: int = option(
        0,
        "resume from the checkpoint of this step and delete the later ones; 0: off",
        minimum=0,
        rerun=False,
    )
    log_interval: int = option(10, "updates between metric lines", minimum=1)
    eval_interval: int = option(1000, "updates between evaluations", minimum=1)
    seed: int = option(0, "random seed (initialization, data order, dropout)", minimum=0)
    gpus: Optional[str] = option(None, "GPU numbers such as 0,1 (default: the CPU)")
    cpu_contexts: int = option(
        1,
        "model replicas in one process on the CPU, to test several devices",
        minimum=1,
        maximum=64,
    )
    check: bool = option(
        False,
        "test that everything is in place, time some steps, write nothing, and exit",
        rerun=False,
    )


@dataclass(frozen=True)
class ElasticSettings:
    """Elastic training, for run_pretraining_distillation_hvd.py only."""

    elastic: bool = option(
        False, "tolerate lost workers and admit new ones (needs an elastic horovodrun)"
    )


class PretrainingSettings(NamedTuple):
    """All settings of a pretraining run, one member per concern."""

    data: DataSettings
    student: StudentSettings
    teacher: TeacherSettings
    loss: LossSettings
    optimizer: OptimizerSettings
    run: RunSettings

    def check(self) -> None:
        """Raise `UserError` for flags that contradict one another."""
        has_teacher = self.teacher.teacher_model or self.teacher.teacher_cache
        if not has_teacher:
            self._refuse_teacher_flags()
        if not self.loss.mlm_weight and not has_teacher:
            raise UserError(
                "--mlm_weight 0: the loss is zero without a teacher; give --teacher_model or "
                "--teacher_cache, or a weight above 0"
            )
        if not self.loss.mlm_weight and not self.loss.teacher_ce_weight:
            raise UserError("--mlm_weight 0 --teacher_ce_weight 0: the loss is zero; give a weight")

    def _refuse_teacher_flags(self) -> None:
        """Raise `UserError` for flags that would have no effect without a teacher."""
        dtype, runtime = self.teacher.teacher_dtype, self.teacher.teacher_runtime
        for flag, is_given in (
            (f"--teacher_dtype {dtype}", dtype != "float32"),
            (f"--teacher_runtime {runtime}", runtime != "mxnet"),
            ("--log_teacher_mse", self.loss.log_teacher_mse),
        ):
            if is_given:
                raise UserError(
                    f"{flag}: there is no teacher; give --teacher_model or --teacher_cache, or "
                    "leave the flag out"
                )


SETTINGS_CLASSES = (
    DataSettings,
    StudentSettings,
    TeacherSettings,
    LossSettings,
    OptimizerSettings,
    RunSettings,
)


def settings_of(**flags: Any) -> PretrainingSettings:
    """Return the settings that these flags of the pretraining program give.

    Raises `UserError` for what the program refuses.
    """
    return PretrainingSettings(
        data=build(DataSettings, flags),
        student=build(StudentSettings, flags),
        teacher=build(TeacherSettings, flags),
        loss=build(LossSettings, flags),
        optimizer=build(OptimizerSettings, flags),
        run=build(RunSettings, flags),
    )


# Flags of the original's pretraining programs, and what to give instead.
ORIGINAL_FLAGS: Mapping[str, str] = {
    "--model": "use --student_model",
    "--pretrained": "name the weights with --student_parameters",
    "--dataset_name": "leave it out; the shards record their vocabulary",
    "--num_eval_steps": "leave it out; it had no effect, all of --data_eval is evaluated",
    "--cpu_only": "leave it out; without --gpus the CPU is used",
    "--verbose": "leave it out; there is no further output",
    "--profile": "leave it out; metrics.jsonl has the share of each phase of a step",
}
