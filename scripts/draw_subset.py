#!/usr/bin/env python3
r"""Draw small training sets, a dev set and a hidden test set from the labelled rows of a task.

    python scripts/draw_subset.py --task_name SST-2 --data_dir DATA --output_dir few \
        --train 200 --dev 200 --test 1000 --timaeus_train 6000 --timaeus_dev 500 --draws 5

The official train and dev files are the pool; of rows with equal inputs the first counts. No row is
in two of the sets, but for train and dev of different draws. Each set lies in the official layout:

    few/timaeus/glue/SST-2/{train,dev}.tsv       for a model that labels
    few/draw-0/glue/SST-2/{train,dev,test}.tsv   the same test set in every draw
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional, Sequence

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code

from bort.agora.algorithm import generator_for
from bort.config import option, parse, required
from bort.errors import UserError, entry_point
from data.rows import read_lines
from data.task import Task
from data.tasks import get_task

# CoLA's training file has no header, by which its test file is read.
COLA_HEADER = b"source\tlabel\tannotation\tsentence"


@dataclass(frozen=True)
class SubsetSettings:
    """Which task, and how many rows go where."""

    task_name: str = required("a task whose files have a row for each example: SST-2, CB, ...")
    output_dir: str = required("folder for the sets")
    data_dir: Optional[str] = option(
        None, "folder of the official data (default: GluonNLP's, $MXNET_HOME/datasets)"
    )
    train: int = option(200, "rows of each training set", minimum=1)
    dev: int = option(200, "rows of each dev set", minimum=1)
    test: int = option(1000, "rows of the test set", minimum=1)
    timaeus_train: int = option(0, "rows for a labeller to learn from", minimum=0)
    timaeus_dev: int = option(0, "rows to choose the labeller on", minimum=0)
    draws: int = option(1, "pairs of a training and a dev set", minimum=1)
    seed: int = option(0, "of the draw", minimum=0)


class Pool(NamedTuple):
    """Labelled lines with different inputs, and the header of their file (None without one)."""

    header: Optional[bytes]
    lines: list[bytes]


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> list[str]:
    """Draw the sets; returns the files written."""
    (settings,) = parse(str(__doc__), argv, SubsetSettings)
    task = get_task(settings.task_name)
    pool = read_pool(task, settings.data_dir)
    root, timaeus = settings.output_dir, settings.timaeus_train + settings.timaeus_dev
    shared = settings.test + timaeus
    needed = shared + settings.train + settings.dev
    if needed > len(pool.lines):
        raise UserError(
            f"{task.name}: the sets need {needed} rows, there are {len(pool.lines)} with different "
            "inputs; ask for fewer"
        )
    order = generator_for(settings.seed, "subset").permutation(len(pool.lines))
    hidden, labeller, rest = np.split(order, [settings.test, shared])
    written = []
    if timaeus:
        parts = np.split(labeller, [settings.timaeus_train])
        written += write_sets(f"{root}/timaeus", task, pool, dict(zip(("train", "dev"), parts)))
    for draw in range(settings.draws):
        drawn = generator_for(settings.seed, "subset", draw).permutation(rest)
        train, dev = np.split(drawn[: settings.train + settings.dev], [settings.train])
        sets = {"train": train, "dev": dev, "test": hidden}
        written += write_sets(f"{root}/draw-{draw}", task, pool, sets)
    print("\n".join(written))
    return written


def read_pool(task: Task, data_dir: Optional[str]) -> Pool:
    """Return the labelled lines of a task; raises `UserError` when a line has several examples."""
    if task.train is None:
        raise UserError(f"--task_name {task.name}: has no training set to draw from")
    lines: dict[tuple, bytes] = {}
    header = None
    for split in (task.train, task.dev[0]):
        path = task.find(data_dir, split)
        examples = task.read(data_dir, split).examples
        content = [line.content for line in read_lines(path)] if path and path.is_file() else []
        extra = len(content) - len(examples)
        if extra not in (0, 1):
            raise UserError(f"{path}: has not one line for each example; draw from another task")
        header = content[0] if extra else None
        for example, line in zip(examples, content[extra:]):
            lines.setdefault(example.inputs, line)
    return Pool(header, list(lines.values()))


def write_sets(root: str, task: Task, pool: Pool, sets: dict[str, np.ndarray]) -> list[str]:
    """Write sets of lines in the official layout; returns their paths."""
    folder = Path(root, task.suite_folders[0], task.folders[0])
    os.makedirs(folder, exist_ok=True)
    names = {file.split: file.name for file in reversed(task.files)}
    written = []
    for kind, rows in sets.items():
        split = {"train": task.train, "dev": task.dev[0], "test": task.test[0]}[kind]
        header = COLA_HEADER if kind == "test" and task.name == "CoLA" else pool.header
        lines = [*([header] if header is not None else []), *(pool.lines[row] for row in rows)]
        path = folder / names[str(split)]
        path.with_suffix(".tmp").write_bytes(b"\n".join(lines) + b"\n")
        os.replace(path.with_suffix(".tmp"), path)
        written.append(str(path))
    return written


if __name__ == "__main__":
    main()
