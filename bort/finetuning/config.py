"""The settings of fine-tuning: one frozen dataclass per concern, from which the flags are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, NamedTuple, Optional

from bort.config import option, required
from bort.errors import UserError
from bort.shapes import CLS, MAX_BUCKETS, MAX_LENGTH, POOLINGS
from bort.tokenization import TokenizerSettings
from bort.training.config import UpdateSettings
from data.race import CASTS

HEAD_DISTRIBUTIONS = ("normal", "uniform", "orthogonal", "xavier")


@dataclass(frozen=True)
class TaskSettings:
    """Task and its data."""

    task_name: str = required("task of GLUE, SuperGLUE or RACE: MRPC, CB, RACE-H, ...")
    data_dir: Optional[str] = option(
        None, "folder of the official data (default: GluonNLP's, $MXNET_HOME/datasets)"
    )
    race_cast: str = option(
        "choices", "RACE as multiple choice, or all options joined in one input", choices=CASTS
    )
    skip_bad_rows: bool = option(False, "skip and count invalid rows instead of stopping")
    train_rows: Optional[int] = option(None, "train on the first N rows only", minimum=1)
    max_len: int = option(
        MAX_LENGTH,
        "maximum number of tokens; longer inputs are truncated; a fine-tuned model predicts with "
        "the number that it was trained with",
        minimum=8,
        maximum=MAX_LENGTH,
    )
    cache_dir: str = option("runs/encoded", "folder that caches encoded examples")


@dataclass(frozen=True)
class ClassifierSettings:
    """Model and its initial weights."""

    model_name: Optional[str] = option(
        None,
        "shape, roberta_12_768_12 or roberta_24_1024_16 (default: that of the weights, or "
        "bort_4_8_768_1024)",
    )
    pretrained_parameters: Optional[str] = option(
        None, "pretrained weights: a parameter file, a pretraining checkpoint or run"
    )
    model_parameters: Optional[str] = option(
        None, "fine-tuned classifier to train further or to predict with"
    )
    dropout: float = option(0.1, "dropout rate during training", minimum=0.0, maximum=0.99)
    init: str = option(
        "normal", "distribution of the new head's weights", choices=HEAD_DISTRIBUTIONS
    )
    prob: float = option(
        0.02,
        "sigma, bound, scale or magnitude of --init normal, uniform, orthogonal or xavier",
        minimum=0.0,
    )
    extra_layer: bool = option(False, "add a dense layer before the head, as for CoLA")
    pooling: str = option(
        CLS,
        "what a new head is applied to: the first token's vector, or the mean over the tokens, as "
        "sentence models were trained with",
        choices=POOLINGS,
    )


@dataclass(frozen=True)
class FinetuningOptimizerSettings(UpdateSettings):
    """Optimizer, learning-rate schedule and stopping."""

    epochs: int = option(10, "epochs to train", minimum=1)
    ramp_up_epochs: Optional[int] = option(
        None, "epochs over which the learning rate decays to its minimum (default: all)", minimum=1
    )
    training_steps: Optional[int] = option(None, "updates, instead of --epochs", minimum=1)
    early_stop: Optional[int] = option(
        None, "stop after N evaluations without improvement", minimum=1
    )
    batch_size: int = option(8, "examples per micro-batch and worker", minimum=1)
    dev_batch_size: int = option(32, "examples per batch of evaluation and prediction", minimum=1)
    accumulate: int = option(1, "micro-batches per worker and update", minimum=1)
    num_buckets: int = option(10, "number of length buckets", minimum=1, maximum=MAX_BUCKETS)
    lr: float = option(5e-5, "peak learning rate", minimum=0.0)
    warmup_ratio: float = option(
        0.1, "fraction of the schedule for linear warmup", minimum=0.0, maximum=1.0
    )
    bias_correction: bool = option(
        False, "correct the bias of Adam's means, as AdamW does and BERTAdam does not"
    )


@dataclass(frozen=True)
class FinetuningRunSettings:
    """Run: folder, checkpoints, log and devices."""

    output_dir: str = option("runs/finetuning", "folder of the results, in a folder per task")
    only_inference: bool = option(False, "evaluate and predict without training")
    resume: bool = option(
        False, "resume from the latest valid checkpoint in the task's folder", rerun=False
    )
    ckpt_interval: Optional[int] = option(
        None, "updates between checkpoints (default: one at the end of each epoch)", minimum=1
    )
    log_interval: int = option(10, "updates between metric lines", minimum=1)
    seed: int = option(0, "random seed (head, data order, dropout)", minimum=0)
    gpus: Optional[str] = option(None, "GPU numbers such as 0,1 (default: the CPU)")
    cpu_contexts: int = option(
        1,
        "model replicas in one process on the CPU, to test several devices",
        minimum=1,
        maximum=64,
    )


class FinetuningSettings(NamedTuple):
    """All settings of a fine-tuning run, one member per concern."""

    task: TaskSettings
    tokenizer: TokenizerSettings
    classifier: ClassifierSettings
    optimizer: FinetuningOptimizerSettings
    run: FinetuningRunSettings

    def check(self) -> None:
        """Raise `UserError` for flags that contradict one another."""
        given = self.classifier
        if given.model_parameters and given.pretrained_parameters:
            raise UserError(
                "--model_parameters contains the body: leave --pretrained_parameters out"
            )
        if self.run.only_inference and not given.model_parameters:
            raise UserError("--only_inference needs --model_parameters: a fine-tuned classifier")


_DATA_DIR = "name the folder of the data with --data_dir"
# Flags of the original's finetune_bort.py, and what to give instead. Its --gpu and --dataset are
# taken as abbreviations of --gpus and --dataset_name.
ORIGINAL_FLAGS: Mapping[str, str] = {
    "--init gaussian": "use --init normal",
    "--no_distributed": "leave it out; one process is the default, horovodrun starts several",
    "--use_scheduler": "leave it out; the learning rate always follows the schedule",
    "--momentum": "leave it out; BERTAdam has no such setting",
    "--multirc_test_location": _DATA_DIR,
    "--record_test_location": _DATA_DIR,
    "--record_dev_location": _DATA_DIR,
    "--race_dataset_location": _DATA_DIR,
}

FINETUNING_CLASSES = (
    TaskSettings,
    TokenizerSettings,
    ClassifierSettings,
    FinetuningOptimizerSettings,
    FinetuningRunSettings,
)
