"""The settings of run_ose.py: the space, the search, and how errors are measured by training."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Optional

from bort.config import MAX_PROCESSES, check_limits, option
from bort.errors import UserError, quoted
from bort.grids import check_size
from bort.ose.bert_family import SPACES
from bort.ose.search import MODES, hyperparameter_sets
from bort.pretraining.config import OptimizerSettings
from bort.processor import require_bfloat16
from bort.shapes import MAX_BUCKETS, MAX_LENGTH, shape_of
from bort.types import Hyperparameters

# The peak rates where none is given: SGD's gradients are clipped to norm 1, so its steps are small.
RATES = {"theory": 0.5, "practical": 1e-3}
# Values that the other mode's optimizer uses alone: a grid of them would train the same again.
UNUSED = {"theory": "epsilon", "practical": "weight_bound"}


@dataclass(frozen=True)
class SpaceSettings:
    """The search space, and how size and cost are counted."""

    space: str = option("bert", f"{', '.join(SPACES)}, or a .yaml file")
    maximum_point: Optional[str] = option(
        None, "model name of T (default: the largest member of the space)"
    )
    vocab_size: Optional[int] = option(
        None, "size of the vocabulary (default: that of --data, or RoBERTa's 50265)", minimum=1
    )
    max_length: int = option(MAX_LENGTH, "number of position embeddings", minimum=1)
    sequence_length: int = option(
        512, "length of the input whose cost is counted, in tokens", minimum=1, maximum=1 << 16
    )
    effective: bool = option(False, "count the encoder's parameters only, without embeddings")
    all_operations: bool = option(False, "count every operation (default: multiply-accumulates)")


@dataclass(frozen=True)
class SearchSettings:
    """The search, and what is printed about the space."""

    list: bool = option(False, "print the ordered space and which AB^nC conditions hold on it")
    explain: Optional[str] = option(
        None, "model name: print its size and cost, and the error at which it would win"
    )
    errors: Optional[str] = option(
        None,
        "search with these errors: a CSV file with the columns architecture and error (repeated "
        "rows are averaged), or `synthetic` for a synthetic scaling law",
    )
    stride: int = option(1, "visit every n-th architecture of the ordered space", minimum=1)
    compare_strides: Optional[str] = option(
        None, "comma-separated strides: search with each, print and plot what each finds"
    )
    measure_latency: bool = option(False, "also measure the CPU time of one input")
    seed: int = option(0, "random seed", minimum=0)
    output_dir: str = option(
        "runs/ose", "folder for ose.json, ose.csv, the plots, the journal and T's run"
    )


@dataclass(frozen=True)
class TrainingSettings:
    """Measuring errors: every candidate is trained on --data."""

    data: Optional[str] = option(None, "folder of training shards, by create_pretraining_data.py")
    data_eval: Optional[str] = option(
        None, "folder of held-out shards, on which the error is measured"
    )
    loss: str = option(
        "teacher",
        "the error: cross-entropy with T as teacher, divergence from T (the same less T's "
        "entropy), or masked-LM loss",
        choices=("teacher", "divergence", "mlm"),
    )
    steps: int = option(200, "training steps of each candidate", minimum=1)
    repeats: int = option(
        1, "training runs of each candidate; their errors are averaged", minimum=1, maximum=1000
    )
    mode: str = option(
        "practical",
        "practical: BERTAdam; theory: SGD, the weights clipped to [-1, 1]",
        choices=tuple(MODES),
    )
    grid: Optional[str] = option(
        None,
        'grid of hyperparameters, as in "lr=5e-4,1e-3 weight_decay=0,0.01": any numeric optimizer '
        "flag of the pretraining program (default lr=1e-3; lr=0.5 in theory mode)",
    )
    batch_size: int = option(16, "sequences per update", minimum=1)
    num_buckets: int = option(2, "number of length buckets", minimum=1, maximum=MAX_BUCKETS)
    dropout: float = option(0.1, "dropout rate in training", minimum=0.0, maximum=0.99)
    dtype: str = option(
        "float32",
        "precision of matrix products in training: bfloat16 needs AVX512-BF16 or AMX; auto: "
        "bfloat16 on such CPUs",
        choices=("float32", "bfloat16", "auto"),
    )
    teacher_ckpt_dir: Optional[str] = option(
        None, "T's weights: a parameter file, a checkpoint or a run (default: T is trained)"
    )
    teacher_cache: Optional[str] = option(
        None, "instead of T's weights: its stored outputs, made by scripts/build_teacher_cache.py"
    )
    teacher_steps: int = option(2000, "training steps of T", minimum=1)
    teacher_lr: float = option(5e-4, "peak learning rate of T", minimum=0.0)
    workers: Optional[int] = option(
        None,
        "candidates trained at once (default: cores / threads)",
        minimum=1,
        maximum=MAX_PROCESSES,
    )
    threads: int = option(1, "OpenMP threads of a candidate", minimum=1, maximum=MAX_PROCESSES)
    max_seconds: Optional[float] = option(
        None, "a candidate that takes more seconds has an infinite error", minimum=0.0
    )
    max_memory: Optional[float] = option(
        None, "a candidate that takes more megabytes has an infinite error", minimum=0.0
    )

    def check(self) -> None:
        """Raise `UserError` for flags that contradict one another and for a wrong --grid."""
        if self.dtype == "bfloat16":
            require_bfloat16("--dtype")
        if bool(self.data) != bool(self.data_eval):
            raise UserError("--data and --data_eval go together: one trains, one measures")
        given = {"teacher_ckpt_dir": self.teacher_ckpt_dir, "teacher_cache": self.teacher_cache}
        flags = [f"--{name}" for name, value in given.items() if value]
        if self.loss == "mlm" and flags:
            raise UserError(f"{flags[0]}: --loss mlm needs no teacher; leave one of them out")
        if len(flags) > 1:
            raise UserError(f"{flags[1]} replaces T's weights: leave {flags[0]} out")
        self.hyperparameters()

    def hyperparameters(self) -> list[Hyperparameters]:
        """Return the sets of hyperparameters to train with, each valid for `OptimizerSettings`."""
        values = read_grid(self.grid) if self.grid else {}
        if UNUSED[self.mode] in values:
            raise UserError(
                f"--grid {UNUSED[self.mode]}: has no effect with --mode {self.mode}; leave one of "
                "them out"
            )
        sets = hyperparameter_sets(self.mode, **{"lr": [RATES[self.mode]], **values})
        for hparams in sets:
            check_limits(replace(OptimizerSettings(), **hparams))
        return sets


def read_grid(text: str) -> dict[str, list[float]]:
    """Return the values of each hyperparameter of `name=value,value name=value`, each once.

    Raises `UserError` for another form, a repeated or unknown name, and too many combinations.
    """
    known = [field.name for field in fields(OptimizerSettings) if field.type == "float"]
    grid: dict[str, list[float]] = {}
    for part in text.split():
        name, _, values = part.partition("=")
        if name not in known:
            raise UserError(f"--grid {quoted(part)}: must name one of {', '.join(known)}")
        if name in grid:
            raise UserError(f"--grid: names {name} twice; give one list of values")
        try:
            grid[name] = [*dict.fromkeys(float(value) for value in values.split(","))]
        except ValueError:
            raise UserError(f"--grid {quoted(part)}: must be numbers, as in lr=5e-4,1e-3") from None
    check_size("--grid", grid)
    return grid


def check_request(
    space: SpaceSettings, settings: SearchSettings, training: TrainingSettings
) -> None:
    """Raise `UserError` when the flags ask for nothing, or contradict one another."""
    asked = (settings.list, settings.explain, settings.errors, settings.measure_latency)
    if not (any(asked) or training.data):
        raise UserError(
            "nothing to do: give --list, --explain, --errors, --data or --measure_latency"
        )
    named = {"--explain": settings.explain, "--maximum_point": space.maximum_point}
    for flag, model_name in named.items():
        try:
            if model_name:
                shape_of(model_name)
        except UserError as error:
            raise UserError(f"{flag}: {error}") from None
    if settings.errors and training.data:
        raise UserError("--errors replaces training: leave out --data or --errors")
    if settings.compare_strides and not (settings.errors or training.data):
        raise UserError("--compare_strides needs --errors or --data: the errors to search with")
    if training.data and space.max_length != MAX_LENGTH:
        raise UserError(
            f"--max_length {space.max_length}: networks are trained with {MAX_LENGTH} positions"
        )


def read_strides(settings: SearchSettings, most: int) -> list[int]:
    """Return all strides to search with: --stride, those of --compare_strides, and 1 with these.

    Raises `UserError` for a stride that is not from 1 to `most`.
    """
    strides = {settings.stride}
    if settings.compare_strides:
        try:
            strides |= {1, *map(int, settings.compare_strides.split(","))}
        except ValueError:
            raise UserError(
                f"--compare_strides {settings.compare_strides}: must be integers, as in 1,2,4"
            ) from None
    wrong = [stride for stride in strides if not 1 <= stride <= most]
    if wrong:
        raise UserError(f"stride {wrong[0]}: must be from 1 to {most}, the size of the space")
    return sorted(strides)


OSE_CLASSES = (SpaceSettings, SearchSettings, TrainingSettings)
