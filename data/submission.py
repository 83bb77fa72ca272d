"""The leaderboards' files and archives: written whole, and checked before anyone uploads them."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import NamedTuple, Optional, Sequence

import numpy as np

from bort.errors import UserError
from data.task import Example, Task, Uid
from data.tasks import get_task, task_names

# Fixed, so that the same predictions make the same archive.
_DATE = (2020, 1, 1, 0, 0, 0)


class Entry(NamedTuple):
    """One file of an archive, and where it came from or which default fills it."""

    name: str
    rows: int
    origin: str
    content: bytes


def write_submission(
    task: Task, split: str, examples: Sequence[Example], scores: np.ndarray, folder: Path
) -> Optional[Path]:
    """Write the official file of a test split into `folder`, whole or not at all.

    scores: [n, classes or options], or [n] for regression, in the order of the examples.
    Returns its path, None for a task without a leaderboard.
    """
    name = task.submission_file(split)
    if name is None:
        return None
    _write(Path(folder) / name, _content(task.submission(examples, scores)))
    return Path(folder) / name


def _content(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode("utf-8")


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def check_submission(
    path: Path, task: Task, split: str, examples: Optional[Sequence[Example]] = None
) -> int:
    """Check one file: name, header, label set, number of rows and order of the indices.

    examples: those of the test split; None means the official one, of which the number of rows is
        known. Returns the number of rows; raises `UserError` at the first thing that the
        leaderboard would refuse.
    """
    if path.name != task.submission_file(split):
        raise UserError(f"{path}: the official name is {task.submission_file(split)}")
    found = task.parse_submission(path, examples)
    wanted = _official_index(task, split, examples)
    if len(found) != len(wanted):
        cure = "" if examples else "; for another test set than the official one give --data_dir"
        raise UserError(f"{path}: holds {len(found)} rows instead of {len(wanted)}{cure}")
    if len(set(found)) != len(found):
        raise UserError(f"{path}: holds an index twice")
    for row, (one, other) in enumerate(zip(found, wanted), 1):
        if other is not None and one != other:
            raise UserError(f"{path}: row {row} has the index {one} instead of {other}")
    return len(found)


def _official_index(
    task: Task, split: str, examples: Optional[Sequence[Example]]
) -> Sequence[Optional[Uid]]:
    """Return the indices in order; None where only their number is known without the data."""
    if examples is not None:
        return task.submission_index(examples)
    number = task.official_rows(split)
    return range(number) if task.counts_from_zero else [None] * number


def gather(
    suite: str, runs: Path, data_dir: Optional[Path] = None, fill_missing: bool = False
) -> list[Entry]:
    """Find every official file of a suite under `runs`, check it, and fill what is missing.

    data_dir: the data that the predictions are for; None means the official test sets.
    fill_missing: put the task's first label (0.000 for STS-B, the first entity for ReCoRD) in
        place of a missing file instead of raising `UserError`.
    """
    entries: list[Entry] = []
    missing: list[str] = []
    for task in map(get_task, task_names(suite)):
        for split in task.test:
            entry = _found(task, split, runs, data_dir)
            if entry is None and fill_missing:
                entry = _filled(task, split, data_dir)
            if entry is None:
                missing.append(str(task.submission_file(split)))
            else:
                entries.append(entry)
    if missing:
        raise UserError(
            f"{runs}: no {', '.join(missing)}; predict these tasks with finetune_classifier.py, "
            "or give --fill_missing"
        )
    return entries


def _found(task: Task, split: str, runs: Path, data_dir: Optional[Path]) -> Optional[Entry]:
    name = str(task.submission_file(split))
    paths = sorted(runs.rglob(name))
    if not paths:
        return None
    if len(paths) > 1:
        raise UserError(f"{paths[0]} and {paths[1]}: give a folder with one run of each task")
    examples = None if data_dir is None else task.read(data_dir, split).examples
    rows = check_submission(paths[0], task, split, examples)
    return Entry(name, rows, str(paths[0]), paths[0].read_bytes())


def _filled(task: Task, split: str, data_dir: Optional[Path]) -> Entry:
    name = str(task.submission_file(split))
    if data_dir is not None:
        examples = task.read(data_dir, split).examples
    elif task.counts_from_zero:
        examples = [Example(number, ()) for number in range(task.official_rows(split))]
    else:
        raise UserError(f"{name}: only --data_dir says which rows --fill_missing has to make")
    lines = task.submission(examples, np.zeros((len(examples), max(1, len(task.labels)))))
    default = "0.000" if not task.labels else task.labels[0]
    default = "the first entity" if task.kind == "candidates" else default
    return Entry(
        name, task.count_rows(examples), f"not predicted, filled with {default}", _content(lines)
    )


def write_archive(path: Path, entries: Sequence[Entry]) -> None:
    """Write the zip archive that the leaderboard takes, whole or not at all."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in entries:
            info = zipfile.ZipInfo(entry.name, _DATE)
            archive.writestr(info, entry.content, zipfile.ZIP_DEFLATED)
    _write(path, buffer.getvalue())
