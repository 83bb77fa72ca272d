"""What a data folder has of each task: the files that were found, and what reading them says."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from bort.errors import UserError
from data.task import Task, is_labelled

HEADER = ("task", "suite", "kind", "metrics", "rows by split", "files", "found")
CHECK_HEADER = ("task", "split", "rows", "official", "labels", "found")


def task_row(task: Task, data_dir: Optional[str]) -> list[str]:
    """Return one row of the table: see `HEADER`."""
    rows = ", ".join(f"{split} {task.official_rows(split):,}" for split in task.splits)
    paths = [task.find(data_dir, split) for split in task.splits]
    present = [split for split, path in zip(task.splits, paths) if path]
    found = ", ".join(present) if len(present) < len(paths) else "all"
    folder = _folder(task, data_dir, paths)
    metrics = ", ".join(task.headline)
    return [task.name, task.suite, task.kind, metrics, rows, folder, found or "none"]


def _folder(task: Task, data_dir: Optional[str], paths: list[Optional[Path]]) -> str:
    """Return the folder of the files that are there, else the first one that is searched."""
    known = next((path for path in paths if path), task.search_paths(data_dir, task.splits[0])[0])
    return str(known.parent)


def check_task(task: Task, data_dir: Optional[str]) -> tuple[list[list[str]], int]:
    """Read every split of a task; returns one row per split, see `CHECK_HEADER`, and the faults.

    A missing or broken file is a fault, another number of rows than the official one is not.
    """
    rows, faults = [], 0
    for split in task.splits:
        official = f"{task.official_rows(split):,}"
        try:
            examples, skipped = task.read(data_dir, split, skip_bad_rows=True)
        except UserError as error:
            message = str(error).removeprefix(f"{task.name}: ")
            rows.append([task.name, split, "-", official, "-", message])
            faults += 1
            continue
        count = task.count_rows(examples)
        found = str(task.find(data_dir, split))
        withdrawn = task.withdrawn_version(split, count)
        found += f" ({withdrawn})" if withdrawn else ""
        if skipped:
            found += f": {len(skipped):,} broken, the first: {skipped[0]}"
            faults += 1
        labels = "yes" if is_labelled(examples) else "no"
        rows.append([task.name, split, f"{count:,}", official, labels, found])
    return rows, faults
