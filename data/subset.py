"""Small sets for experiments with little data, drawn from the official files of a task.

<output_dir>/timaeus/<suite>/<task>/     train and dev sets of a model that labels
             draw-0/<suite>/<task>/      train, dev and test sets; the same test sets in
             draw-1/...                  every draw
"""

from __future__ import annotations

import itertools
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from bort.config import option, required
from bort.errors import UserError
from bort.files import WHOLE_BYTES, atomic_write, lock_folder, open_regular, remove_temporaries
from bort.generators import generator_for
from bort.sums import SUMS, write_sums
from bort.types import TaskKind
from data.rows import decode, parse_object, read_lines
from data.task import Task, is_labelled
from data.tasks import get_task

# CoLA's training file has no header, its test file needs one.
COLA_HEADER = b"source\tlabel\tannotation\tsentence"


@dataclass(frozen=True)
class SubsetSettings:
    """Which task, and how many rows each set has."""

    task_name: str = required("a task of GLUE or SuperGLUE with a training set: SST-2, CB, ...")
    output_dir: str = required("folder for the sets")
    data_dir: Optional[str] = option(
        None, "folder of the official data (default: GluonNLP's, $MXNET_HOME/datasets)"
    )
    train: int = option(200, "rows of each training set", minimum=1)
    dev: int = option(200, "rows of each dev set", minimum=1)
    test: int = option(1000, "rows of each test set", minimum=1)
    timaeus_train: int = option(0, "rows of the labeller's training set; 0: none", minimum=0)
    timaeus_dev: int = option(0, "rows of the labeller's dev set; 0: none", minimum=0)
    draws: int = option(1, "number of pairs of a training and a dev set", minimum=1)
    seed: int = option(0, "random seed of the draw", minimum=0)


class Pool(NamedTuple):
    """Labelled lines with different inputs, and the header of their file (None without one)."""

    header: Optional[bytes]
    lines: list[bytes]


class Set(NamedTuple):
    """One set to write: its data folder, its split, and its lines."""

    root: Path
    split: str
    lines: list[bytes]


def draw_subsets(settings: SubsetSettings) -> list[str]:
    """Draw the sets, write them in the official layout, read them back; returns the files.

    Of lines with equal inputs the first counts. No line is in two sets, except in train and dev of
    different draws. A task with a second dev set (MNLI's mismatched) has a second pool for its
    dev and test sets. Raises `UserError` for fewer lines than the sets need, for files of another
    draw, while another process draws there, and, after removing what was written, for a set that
    cannot be read back.
    """
    task = get_task(settings.task_name, flag="--task_name")
    if task.train is None:
        raise UserError(f"--task_name {task.name}: has no training set to draw from")
    pool = read_pool(task, settings.data_dir, (task.train, task.dev[0]))
    sets = _draw(task, pool, settings, 0)
    for number, split in enumerate(task.dev[1:], 1):
        other = read_pool(task, settings.data_dir, (split,))
        other = Pool(pool.header, _with_columns(other, pool.header, task.name))
        sets += _draw(task, other, settings, number)
    files = {_path(each, task): _content(each, task, pool.header) for each in sets}
    # In the folder that every draw has: that of its first training set.
    with lock_folder(os.path.dirname(_path(_first_training_set(sets, task), task)), "--output_dir"):
        _write(files, sets, task, pool.header)
    return [*files]


def _write(
    files: Mapping[str, bytes], sets: Sequence[Set], task: Task, header: Optional[bytes]
) -> None:
    """Write the files that are missing, and read all sets back."""
    folders = {os.path.dirname(path) for path in files}
    for folder in folders:  # the lock is that of one of them
        remove_temporaries(folder, levels=0)
    missing = [path for path, content in files.items() if not _is_there(path, content)]
    try:
        for path in missing:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with atomic_write(path, "wb") as handle:
                handle.write(files[path])
        for each in sets:
            _read_back(each, task, header)
        written = {os.path.dirname(path) for path in missing}
        for folder in folders:
            # A program that was killed may have left files without their sums.
            if folder in written or not os.path.exists(os.path.join(folder, SUMS)):
                write_sums(folder, _names_in(folder, files))
    except BaseException:
        for path in missing:
            with suppress(FileNotFoundError):
                os.remove(path)
        raise


def _first_training_set(sets: Sequence[Set], task: Task) -> Set:
    return next(each for each in sets if each.root.name == "draw-0" and each.split == task.train)


def _names_in(folder: str, files: Iterable[str]) -> list[str]:
    return [os.path.basename(path) for path in files if os.path.dirname(path) == folder]


def _is_there(path: str, content: bytes) -> bool:
    """Return whether a file is there; raises `UserError` when it has other content."""
    if not os.path.exists(path):
        return False
    with open_regular(path, WHOLE_BYTES) as handle:
        if handle.read() != content:
            raise UserError(f"{path}: is of another draw; name another --output_dir")
    return True


def read_pool(task: Task, data_dir: Optional[str], splits: Sequence[str]) -> Pool:
    """Return the labelled lines of splits, all with the columns of the first.

    Raises `UserError` for a broken line, and for a task whose sets are folders.
    """
    pools = [_read_file(task, data_dir, split) for split in splits]
    header = pools[0].header
    lines: dict[tuple, bytes] = {}
    for pool in pools:
        for line in _with_columns(pool, header, task.name):
            lines.setdefault(_inputs(task, header, line), line)
    return Pool(header, list(lines.values()))


def _read_file(task: Task, data_dir: Optional[str], split: str) -> Pool:
    task.read(data_dir, split)  # raises for a missing file and for a broken line
    path = task.find(data_dir, split)
    if path is None or path.is_dir():
        raise UserError(f"{path}: is a folder; draw from a task with one file per set")
    lines = [line.content for line in read_lines(path)]
    if task.suite == "superglue" or task.name == "CoLA":
        return Pool(None, lines)
    return Pool(lines[0], lines[1:])


def _with_columns(pool: Pool, header: Optional[bytes], name: str) -> list[bytes]:
    """Return a pool's lines with the columns of another header."""
    if header is None or pool.header is None or pool.header == header:
        return pool.lines
    own, wanted = pool.header.split(b"\t"), header.split(b"\t")
    missing = [column.decode("utf-8", "replace") for column in wanted if column not in own]
    if missing:
        raise UserError(f"{name}: a dev file has no column {', '.join(missing)} of the train file")
    order = [own.index(column) for column in wanted]
    rows = (line.split(b"\t") for line in pool.lines)
    return [b"\t".join(row[column] for column in order) for row in rows]


def _inputs(task: Task, header: Optional[bytes], line: bytes) -> tuple:
    """Return the inputs of a line's examples: lines with equal ones are the same."""
    if task.suite == "superglue":
        examples = task.cast_row(parse_object(line), 0)
    else:
        columns = decode(header or COLA_HEADER).split("\t")
        examples = task.cast_row(dict(zip(columns, decode(line).split("\t"))), 0)
    return tuple(example.inputs for example in examples)


def _draw(task: Task, pool: Pool, settings: SubsetSettings, number: int) -> list[Set]:
    """Draw the sets of pool `number`; only pool 0 has training sets."""
    train, timaeus_train = (0, 0) if number else (settings.train, settings.timaeus_train)
    shared = settings.test + timaeus_train + settings.timaeus_dev
    _require_lines(task, pool, shared + train + settings.dev, number)
    purpose = f"subset {number}" if number else "subset"
    order = generator_for(settings.seed, purpose).permutation(len(pool.lines))
    test, labeller, rest = np.split(order, [settings.test, shared])
    split_names = (str(task.train), task.dev[number], task.test[number])
    root = Path(settings.output_dir)
    none = labeller[:0]
    drawn = [(root / "timaeus", (labeller[:timaeus_train], labeller[timaeus_train:], none))]
    for pair in range(settings.draws):
        chosen = generator_for(settings.seed, purpose, pair).permutation(rest)
        chosen = chosen[: train + settings.dev]
        drawn.append((root / f"draw-{pair}", (chosen[:train], chosen[train:], test)))
    return [
        Set(folder, split, [pool.lines[row] for row in rows])
        for folder, parts in drawn
        for split, rows in zip(split_names, parts)
        if len(rows)
    ]


def _require_lines(task: Task, pool: Pool, needed: int, number: int) -> None:
    if needed > len(pool.lines):
        of = f" of {task.dev[number]}" if number else ""
        raise UserError(
            f"{task.name}: the sets need {needed} rows{of}, there are {len(pool.lines)} with "
            "different inputs; ask for fewer"
        )


def _path(drawn: Set, task: Task) -> str:
    """Return the path of a set: that of the official file of its split."""
    names = {file.split: file.name for file in reversed(task.files)}
    return str(drawn.root / task.suite_folders[0] / task.folders[0] / names[drawn.split])


def _content(drawn: Set, task: Task, header: Optional[bytes]) -> bytes:
    lines = drawn.lines if task.counts_from_zero else _renumbered(drawn.lines)
    if task.name == "CoLA" and drawn.split in task.test:
        header = COLA_HEADER
    return b"".join(line + b"\n" for line in [*([] if header is None else [header]), *lines])


def _renumbered(lines: Sequence[bytes]) -> list[bytes]:
    """Return JSON lines with new indices of passages and queries.

    MultiRC's and ReCoRD's answers are grouped by them, and those of the train and dev files are
    the same.
    """
    queries = itertools.count()
    rows = []
    for number, line in enumerate(lines):
        row = {**parse_object(line), "idx": number}
        for query in row.get("qas", []):
            query["idx"] = next(queries)
        rows.append(json.dumps(row, ensure_ascii=False).encode("utf-8"))
    return rows


def _read_back(drawn: Set, task: Task, header: Optional[bytes]) -> None:
    """Raise `UserError` unless the written set has the examples of the drawn lines."""
    examples = task.read(drawn.root, drawn.split).examples
    inputs = {example.inputs for example in examples}
    expected = {text for line in drawn.lines for text in _inputs(task, header, line)}
    # ReCoRD's training set has only some of the candidates, and answers that are not entities.
    sampled = task.kind == TaskKind.CANDIDATES and drawn.split == task.train
    if (not sampled and inputs != expected) or not is_labelled(examples):
        raise UserError(f"{task.find(drawn.root, drawn.split)}: does not read back as it was drawn")
