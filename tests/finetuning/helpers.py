"""What the tests of fine-tuning share: a tiny task that can be learned, and tiny runs on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bort.communicator import Communicator, SingleProcess
from bort.config import parse

SHAPE = "bort_1_2_32_32"
GOOD = ("warm", "funny", "moving", "fresh", "lively", "bright")
BAD = ("dull", "clumsy", "hollow", "stale", "tired", "grey")
THINGS = ("story", "cast", "scene", "score", "film", "plot")


def write_reviews(folder: Path, train: int = 64, dev: int = 20, test: int = 10) -> Path:
    """Write SST-2 files whose sentences one word decides; returns the folder for --data_dir."""
    generator = np.random.default_rng(3)
    (folder / "SST-2").mkdir(parents=True)
    for name, rows in (("train", train), ("dev", dev), ("test", test)):
        lines = ["index\tsentence" if name == "test" else "sentence\tlabel"]
        for row in range(rows):
            label = row % 2
            thing, other = generator.choice(THINGS, 2, replace=False)
            word = generator.choice(GOOD if label else BAD)
            text = f"a {word} {thing}" + f" and the {other} too" * int(generator.integers(0, 3))
            lines.append(f"{row}\t{text}" if name == "test" else f"{text}\t{label}")
        path = folder / "SST-2" / f"{name}.tsv"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def arguments(data_dir: Path, output_dir: Path, **flags: Any) -> list[str]:
    """Return the command line of a tiny run; `flags` override it."""
    settings = {
        "task_name": "SST-2",
        "data_dir": data_dir,
        "output_dir": output_dir,
        "cache_dir": output_dir / "encoded",
        "model_name": SHAPE,
        "epochs": 3,
        "batch_size": 8,
        "num_buckets": 3,
        "lr": 0.003,
        "log_interval": 3,
        "max_len": 64,
        "seed": 7,
        **flags,
    }
    line = []
    for name, value in settings.items():
        if value is not False and value is not None:
            line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def settings_of(data_dir: Path, output_dir: Path, **flags: Any) -> Any:
    """Return the settings of a tiny run."""
    from bort.finetuning.config import FINETUNING_CLASSES, FinetuningSettings

    return FinetuningSettings(
        *parse("", arguments(data_dir, output_dir, **flags), *FINETUNING_CLASSES)
    )


def finetuned(data_dir: Path, output_dir: Path, **flags: Any) -> dict[str, Any]:
    """Run the program to its end; returns the metrics."""
    from bort.finetuning.run import finetune

    return finetune(settings_of(data_dir, output_dir, **flags), SingleProcess())


def make_run(
    data_dir: Path, output_dir: Path, communicator: Communicator | None = None, **flags: Any
) -> Any:
    """Return a run that is ready to start."""
    from bort.devices import devices_of
    from bort.finetuning.classifier import build_classifier
    from bort.finetuning.run import finetuning_run
    from bort.finetuning.task_data import read_task_data
    from data.tasks import get_task

    settings = settings_of(data_dir, output_dir, **flags)
    communicator = communicator or SingleProcess()
    task = get_task(settings.task.task_name, race_cast=settings.task.race_cast)
    data, _ = read_task_data(task, settings.task, settings.run.seed)
    devices = devices_of(settings.run.gpus, settings.run.cpu_contexts, communicator)
    classifier = build_classifier(settings, task, devices, processes=1)
    return finetuning_run(settings, classifier, data, communicator, devices)
