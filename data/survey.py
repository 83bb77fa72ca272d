"""What a data folder has of each task: the files that were found, and what reading them says."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from bort.errors import UserError
from data.task import Task, is_labelled

HEADER = ("task", "suite", "kind", "metrics", "rows by split", "files", "found")


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


def check_task(task: Task, data_dir: Optional[str]) -> tuple[list[str], int]:
    """Read every split of a task; returns one line per split and the number of faults.

    A missing or broken file is a fault, another number of rows than the official one is not.
    """
    lines, faults = [], 0
    for split in task.splits:
        try:
            examples, skipped = task.read(data_dir, split, skip_bad_rows=True)
        except UserError as error:
            lines.append(f"{task.name} {split}: {error}")
            faults += 1
            continue
        path, rows = task.find(data_dir, split), task.count_rows(examples)
        notes = [_row_count(task, split, rows), f"{len(examples):,} examples"]
        notes.append("labelled" if is_labelled(examples) else "no labels")
        if skipped:
            notes.append(f"{len(skipped):,} broken rows, the first: {skipped[0]}")
            faults += 1
        lines.append(f"{task.name} {split}: {path}: {', '.join(notes)}")
    return lines, faults


def _row_count(task: Task, split: str, rows: int) -> str:
    official = task.official_rows(split)
    if rows == official:
        return f"{rows:,} rows, as the official file"
    withdrawn = task.withdrawn_version(split, rows)
    return f"{rows:,} rows" + (f" ({withdrawn})" if withdrawn else f" (official: {official:,})")
