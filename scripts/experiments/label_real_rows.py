#!/usr/bin/env python3
r"""Make a data folder whose training set is scarce rows and real ones with a labeller's labels.

    python scripts/experiments/label_real_rows.py --task_name SST-2 --data_dir sets/draw-0 \
        --labels sets/draw-0/labels.tsv --rows 200 --first_real 500 \
        --agora agora/draw-0 --output_dir real

The first --rows rows of train keep their labels. From row --first_real on, as many rows as the last
fits of the run --agora had augmented examples get the labels of --labels, which scripts/predict.py
wrote for the whole training file. Dev and test are copied.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's code

from bort.config import option, parse, required
from bort.errors import UserError, entry_point
from bort.files import atomic_write, read_json
from data.glue import GlueTask
from data.tasks import get_task


@dataclass(frozen=True)
class RealRowsSettings:
    """The drawn sets, the labels, and how many rows of each kind."""

    task_name: str = required("a task of GLUE")
    data_dir: str = required("folder of a draw of draw_subset.py")
    labels: str = required("predictions of predict.py for every row of train")
    agora: str = required("run of run_agora.py, which decides on the number of real rows")
    output_dir: str = required("folder of the new sets")
    rows: int = option(200, "scarce rows", minimum=1)
    first_real: int = option(500, "number of the first real row, counted from 0", minimum=1)


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> Path:
    """Write the folder; returns the path of its training file."""
    (settings,) = parse(str(__doc__), argv, RealRowsSettings)
    task = get_task(settings.task_name, flag="--task_name")
    if not isinstance(task, GlueTask):
        raise UserError(f"--task_name {task.name}: is not a task of GLUE")
    source = task.find(settings.data_dir, str(task.train))
    if source is None:
        raise UserError(f"--data_dir {settings.data_dir}: has no training set of {task.name}")
    target = Path(settings.output_dir) / source.relative_to(settings.data_dir)
    lines = source.read_text(encoding="utf-8").rstrip("\n").split("\n")
    labels = Path(settings.labels).read_text(encoding="utf-8").splitlines()
    rounds = read_json(str(Path(settings.agora) / task.name / "agora.json"))["rounds"]
    real = rounds[-1]["train_size"] - rounds[0]["train_size"]
    content = with_real_rows(task.label_column, lines, labels, real, settings)
    target.parent.mkdir(parents=True, exist_ok=True)
    for split in (*task.dev, *task.test):
        path = task.find(settings.data_dir, split)
        if path:
            shutil.copyfile(path, target.parent / path.name)
    with atomic_write(str(target)) as handle:
        handle.write("\n".join(content) + "\n")
    return target


def with_real_rows(
    column: str,
    lines: Sequence[str],
    labels: Sequence[str],
    real: int,
    settings: RealRowsSettings,
) -> list[str]:
    """Return the header, the scarce lines, and `real` lines with the labels of the labeller.

    Raises `UserError` when lines and labels do not belong together or are too few.
    """
    header, *rows = lines
    if column not in header.split("\t"):
        raise UserError(f"--task_name {settings.task_name}: its training file has no header")
    if not real:
        raise UserError(f"{settings.agora}: its last fits had no augmented examples to replace")
    end = settings.first_real + real
    if len(labels) != len(rows):
        raise UserError(f"{settings.labels}: has {len(labels)} lines for {len(rows)} rows of train")
    if not settings.rows <= settings.first_real < end <= len(rows):
        raise UserError(
            f"--rows {settings.rows} --first_real {settings.first_real}: must be in this order, "
            f"and {real} real rows follow within the {len(rows)} rows of train"
        )
    place = header.split("\t").index(column)
    labelled = []
    for number in range(settings.first_real, end):
        fields = rows[number].split("\t")
        fields[place] = labels[number].split("\t")[0]
        labelled.append("\t".join(fields))
    return [header, *rows[: settings.rows], *labelled]


if __name__ == "__main__":
    main()
