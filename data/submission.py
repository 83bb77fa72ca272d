"""The leaderboards' files and archives: written atomically, checked before they are uploaded."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import NamedTuple, Optional, Sequence

import numpy as np

from bort.errors import UserError
from bort.files import atomic_write, files_named, refuse_overwriting, remove_left_overs_of
from bort.sums import check_sum
from bort.types import TaskKind
from data.task import Example, Task, Uid
from data.tasks import get_task, task_names

# Fixed, so that the same predictions give the same archive.
_DATE = (2020, 1, 1, 0, 0, 0)


class Entry(NamedTuple):
    """One file of an archive, and its path or the default that fills it."""

    name: str
    rows: int
    origin: str
    content: bytes


def write_submission(
    task: Task, split: str, examples: Sequence[Example], logits: np.ndarray, folder: Path
) -> Optional[Path]:
    """Write the official file of a test split into `folder`, atomically.

    logits: [n, classes or options], or [n] for regression, in the order of the examples.
    Returns its path, None for a task without a leaderboard.
    Raises `UserError` when a logit is NaN or infinite, or the file cannot be written.
    """
    name = task.submission_file(split)
    if name is None:
        return None
    if not np.isfinite(logits).all():
        raise UserError(
            f"{Path(folder) / name}: not written, the model's outputs contain NaN or infinity; "
            "its weights are damaged or its training diverged"
        )
    _write(Path(folder) / name, _content(task.submission(examples, logits)))
    return Path(folder) / name


def _content(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode("utf-8")


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    remove_left_overs_of(str(path))
    with atomic_write(str(path), "wb") as handle:
        handle.write(content)


def check_submission(
    path: Path, task: Task, split: str, examples: Optional[Sequence[Example]] = None
) -> int:
    """Check one file: name, header, label set, number of rows and order of the indices.

    examples: those of the test split; None means the official one, whose number of rows is known.
    Returns the number of rows; raises `UserError` at the first fault that the leaderboard would
    refuse.
    """
    if path.name != task.submission_file(split):
        raise UserError(f"{path}: the official name is {task.submission_file(split)}")
    check_sum(str(path))
    found = task.parse_submission(path, examples)
    wanted = _official_index(task, split, examples)
    if withdrawn := task.withdrawn_version(split, len(found)):  # the data may be old, too
        raise UserError(
            f"{path}: has {len(found)} rows instead of {task.official_rows(split)}: they answer "
            f"{withdrawn}, which the leaderboard no longer takes; predict the test set of today, "
            f"which scripts/download_data.py {task.name} fetches"
        )
    if len(found) != len(wanted):
        cure = "" if examples else "; for another test set than the official one give --data_dir"
        raise UserError(f"{path}: has {len(found)} rows instead of {len(wanted)}{cure}")
    # Sets drawn from the train and dev files may have the same index twice themselves.
    if len(set(found)) != len(found) and sorted(map(str, found)) != sorted(map(str, wanted)):
        raise UserError(f"{path}: has an index twice")
    for row, (index, expected) in enumerate(zip(found, wanted), 1):
        if expected is not None and index != expected:
            raise UserError(f"{path}: row {row} has the index {index} instead of {expected}")
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

    data_dir: the data that were predicted; None means the official test sets.
    fill_missing: write the task's first label (0.000 for STS-B, the first entity for ReCoRD) for
        a missing file instead of raising `UserError`.
    Raises `UserError` when `runs` has none of the files at all.
    """
    if not runs.is_dir():
        raise UserError(f"--runs {runs}: is not a folder")
    splits = [(task, split) for task in map(get_task, task_names(suite)) for split in task.test]
    found = [_found(task, split, runs, data_dir) for task, split in splits]
    missing = [
        str(task.submission_file(split)) for (task, split), entry in zip(splits, found) if not entry
    ]
    if len(missing) == len(splits):
        raise UserError(f"--runs {runs}: has no file of {suite} ({', '.join(missing)})")
    if missing and not fill_missing:
        raise UserError(
            f"{runs}: no {', '.join(missing)}; predict these tasks with finetune_classifier.py, "
            "or give --fill_missing"
        )
    return [entry or _filled(task, split, data_dir) for (task, split), entry in zip(splits, found)]


def _found(task: Task, split: str, runs: Path, data_dir: Optional[Path]) -> Optional[Entry]:
    name = str(task.submission_file(split))
    paths = [Path(path) for path in files_named(name, runs)]
    if not paths:
        return None
    if len(paths) > 1:
        raise UserError(
            f"{paths[0]} and {paths[1]}: name a folder with one run of each task, or with links to "
            "them; the best run of a sweep is the one that has best.params"
        )
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
        raise UserError(f"{name}: --fill_missing needs --data_dir to know its rows")
    lines = task.submission(examples, np.zeros((len(examples), max(1, len(task.labels)))))
    default = "0.000" if not task.labels else task.labels[0]
    default = "the first entity" if task.kind == TaskKind.CANDIDATES else default
    return Entry(
        name, task.count_rows(examples), f"not predicted, filled with {default}", _content(lines)
    )


def write_archive(path: Path, entries: Sequence[Entry]) -> None:
    """Write the zip archive that the leaderboard takes, atomically.

    Raises `UserError` when it would replace one of the files that are packed.
    """
    refuse_overwriting(str(path), *(entry.origin for entry in entries))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in entries:
            info = zipfile.ZipInfo(entry.name, _DATE)
            archive.writestr(info, entry.content, zipfile.ZIP_DEFLATED)
    _write(path, buffer.getvalue())
