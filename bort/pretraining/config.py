"""The settings of pretraining: one frozen dataclass per concern, from which the flags are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

from bort.config import build, option, required
from bort.errors import UserError
from bort.training.config import UpdateSettings


@dataclass(frozen=True)
class DataSettings:
    """What is learnt from, and how it is cut into batches."""

    data: str = required("folder of training shards, made by create_pretraining_data.py")
    data_eval: Optional[str] = option(None, "folder of held-out shards")
    batch_size: int = option(8, "sequences per micro-batch and worker", minimum=1)
    batch_size_eval: int = option(8, "sequences per batch of the evaluation", minimum=1)
    accumulate: int = option(1, "micro-batches per worker and update", minimum=1)
    num_buckets: int = option(10, "ranges of length; a batch is made within one", minimum=1)
    use_avg_len: bool = option(False, "batch sizes count tokens instead of sequences")
    dynamic_masking: bool = option(
        False,
        "draw new masks in each epoch, as RoBERTa did, instead of using those of the shards; not "
        "with --teacher_cache",
    )
    no_verify: bool = option(
        False, "do not read the shards at the start to check their SHA-256 and ids"
    )


@dataclass(frozen=True)
class StudentSettings:
    """The model that is trained."""

    student_model: str = option(
        "bort_4_8_768_1024", "shape: bort_<layers>_<heads>_<intermediate>_<hidden>"
    )
    student_parameters: Optional[str] = option(None, "start from these weights, not random ones")
    dropout: float = option(0.1, "dropout rate while training", minimum=0.0, maximum=0.99)


@dataclass(frozen=True)
class TeacherSettings:
    """The frozen model that is imitated; without one the loss is masked language modelling only."""

    teacher_model: Optional[str] = option(
        None, "roberta_24_1024_16, roberta_12_768_12, or a shape as for --student_model"
    )
    teacher_ckpt_dir: Optional[str] = option(
        None, "the teacher's weights: a parameter file, a checkpoint, or a run's folder"
    )
    teacher_cache: Optional[str] = option(
        None, "the teacher's stored outputs, made by scripts/build_teacher_cache.py, instead of it"
    )

    def check(self) -> None:
        """Raise `UserError` when the flags do not name one teacher."""
        if self.teacher_cache and self.teacher_model:
            raise UserError("--teacher_cache stands for the teacher: leave --teacher_model out")
        if self.teacher_model and not self.teacher_ckpt_dir:
            raise UserError(
                "--teacher_model needs --teacher_ckpt_dir: an untrained teacher is none"
            )
        if self.teacher_ckpt_dir and not self.teacher_model:
            raise UserError("--teacher_ckpt_dir needs --teacher_model, the shape of those weights")


@dataclass(frozen=True)
class LossSettings:
    """mlm_weight * cross-entropy + teacher_ce_weight * T^2 * KL(teacher / T || student / T)."""

    mlm_weight: float = option(0.1, "weight of the masked-LM cross-entropy", minimum=0.0)
    teacher_ce_weight: float = option(0.5, "weight of the distance from the teacher", minimum=0.0)
    distillation_temperature: float = option(2.0, "T, softens both distributions", minimum=0.01)
    log_teacher_mse: bool = option(
        False, "also log the mean square between the two distributions, which costs time"
    )


@dataclass(frozen=True)
class OptimizerSettings(UpdateSettings):
    """BERTAdam, or SGD, and its schedule."""

    num_steps: int = option(1000, "updates to make", minimum=1)
    lr: float = option(1e-4, "peak learning rate", minimum=0.0)
    warmup_ratio: float = option(
        0.01, "part of the steps in which the rate rises", minimum=0.0, maximum=1.0
    )
    optimizer: str = option(
        "bertadam",
        "bertadam, or sgd: no moments, weights clipped to --weight_bound (OSE's theory)",
        choices=("bertadam", "sgd"),
    )
    weight_bound: float = option(
        1.0, "with sgd, no weight leaves [-weight_bound, weight_bound]", minimum=1e-9
    )

    @property
    def warmup_steps(self) -> int:
        """Return the number of steps of the warm-up."""
        return int(self.num_steps * self.warmup_ratio)

    @property
    def sgd_bound(self) -> Optional[float]:
        """Return the bound on the weights under SGD; None under BERTAdam, which needs none."""
        return self.weight_bound if self.optimizer == "sgd" else None

    def check(self) -> None:
        """Raise `UserError` when the optimiser cannot do the type."""
        if self.optimizer == "sgd" and self.dtype != "float32":
            raise UserError(f"--dtype {self.dtype}: --optimizer sgd works in float32 only")


@dataclass(frozen=True)
class RunSettings:
    """Where the run goes, what it says, and where it stops and starts."""

    ckpt_dir: str = option("runs/pretraining", "folder of checkpoints and metrics")
    ckpt_interval: int = option(1000, "updates between checkpoints", minimum=1)
    keep_checkpoints: int = option(3, "newest checkpoints to keep, besides the best", minimum=1)
    resume: bool = option(False, "go on from the newest good checkpoint in --ckpt_dir")
    start_step: int = option(
        0, "go on from the checkpoint of this step and delete the later ones", minimum=0
    )
    log_interval: int = option(10, "updates between metric lines", minimum=1)
    eval_interval: int = option(1000, "updates between evaluations", minimum=1)
    seed: int = option(0, "of the weights, the order of the data and the dropout", minimum=0)
    gpus: Optional[str] = option(None, "device numbers such as 0,1; without: the CPU")
    cpu_contexts: int = option(1, "replicas of the model in one process on the CPU", minimum=1)
    check: bool = option(
        False, "print what is known before the run, time some steps, write nothing, and exit"
    )


@dataclass(frozen=True)
class ElasticSettings:
    """What happens when workers are lost; of the program for many processes only."""

    elastic: bool = option(
        False, "go on without lost workers and let new ones in (under elastic horovodrun)"
    )


class PretrainingSettings(NamedTuple):
    """All settings of a pretraining run, one member per concern."""

    data: DataSettings
    student: StudentSettings
    teacher: TeacherSettings
    loss: LossSettings
    optimizer: OptimizerSettings
    run: RunSettings


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
