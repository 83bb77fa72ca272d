"""The settings of Agora on text: its own and those shared with fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional

from bort.agora.algorithm import AgoraSettings
from bort.agora.tau import TauSettings
from bort.config import MAX_PROCESSES, option, required
from bort.errors import UserError
from bort.finetuning.config import (
    ClassifierSettings,
    FinetuningOptimizerSettings,
    TaskSettings,
)
from bort.tokenization import TokenizerSettings


@dataclass(frozen=True)
class AgoraRunSettings:
    """The labeller, the search space and the folder of the run."""

    search_space: str = required("YAML grid: each line a hyperparameter and the list of its values")
    timaeus: Optional[str] = option(None, "the labeller: a fine-tuned model, its file or folder")
    timaeus_labels: Optional[str] = option(
        None, "labels made elsewhere, JSON lines; inputs without one are written for labelling"
    )
    regression_edges: str = option(
        "0.5,1.5,2.5,3.5,4.5",
        "STS-B: edges of the bins; a prediction in another bin than its label is a mistake",
    )
    output_dir: str = option(
        "runs/agora", "results are written to a folder named after the task in here"
    )
    seed: int = option(
        0, "random seed of the augmentation; that of fits is a hyperparameter", minimum=0
    )
    workers: int = option(
        1,
        "fits at a time; each has its share of the cores and of --gpus",
        minimum=1,
        maximum=MAX_PROCESSES,
    )
    gpus: Optional[str] = option(None, "device numbers such as 0,1 (default: the CPU)")

    def check(self) -> None:
        """Raise `UserError` unless there is one labeller and the edges increase."""
        if bool(self.timaeus) == bool(self.timaeus_labels):
            raise UserError("give one labeller: --timaeus or --timaeus_labels")
        if sorted(set(self.edges)) != self.edges:
            raise UserError(f"--regression_edges {self.regression_edges}: must increase")

    @property
    def edges(self) -> list[float]:
        """Return the edges of the bins."""
        try:
            return [float(edge) for edge in self.regression_edges.split(",")]
        except ValueError:
            raise UserError(
                f"--regression_edges {self.regression_edges}: must be numbers, as in 1.5,3.5"
            ) from None


class AgoraTextSettings(NamedTuple):
    """All settings of a run."""

    run: AgoraRunSettings
    agora: AgoraSettings
    tau: TauSettings
    task: TaskSettings
    tokenizer: TokenizerSettings
    classifier: ClassifierSettings
    optimizer: FinetuningOptimizerSettings


# Fields of these classes that no flag sets: a fit is one process, and skips updates that are not
# finite.
WITHOUT_FLAG = ("compression", "on_nonfinite")
AGORA_CLASSES = (
    AgoraRunSettings,
    AgoraSettings,
    TauSettings,
    TaskSettings,
    TokenizerSettings,
    ClassifierSettings,
    FinetuningOptimizerSettings,
)
