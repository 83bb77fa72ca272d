"""One check for each kind of folder, made of the readers that the programs use.

A check returns what it found; it raises `UserError` for damage. Nothing is written.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, NamedTuple, TypeVar

import numpy as np

from bort import checkpoint
from bort.errors import UserError, escaped
from bort.files import open_regular, read_json
from bort.sums import listed
from bort.types import JSONObject
from data.shards import MANIFEST_FILE, UNFINISHED_FILE

MAX_ROW = 1 << 20  # bytes
ENCODED_PART = re.compile(r"[0-9a-f]{64}\.npz")


class Found(NamedTuple):
    """What a check found: whether nothing is missing, and what there is, in words."""

    complete: bool
    detail: str


class Kind(NamedTuple):
    """A kind of folder: its name, how it is recognised, and its check."""

    name: str
    matches: Callable[[Path], bool]
    check: Callable[[Path], Found]


def check_json(folder: Path) -> None:
    """Read every JSON file of a folder, with its SHA-256 where it has one."""
    for path in sorted(folder.glob("*.json")):
        read_json(str(path))


# ---- data ----------------------------------------------------------------------------------------


def check_shards(folder: Path) -> Found:
    """Read every shard and compare its SHA-256, ids and positions; the tokenizer beside them."""
    from data.shards import open_shards, read_manifest, shards_tokenizer

    if not (folder / MANIFEST_FILE).exists():
        manifest = read_manifest(str(folder), UNFINISHED_FILE)
        return Found(False, f"{len(manifest.shards)} shards so far; run its command again")
    shards = open_shards(str(folder), remember=False)
    shards_tokenizer(str(folder), shards.manifest)
    return Found(True, f"{len(shards.shards)} shards, {shards.num_sequences:,} sequences")


def check_encoded_cache(folder: Path) -> Found:
    """Read every part of a cache of encoded examples."""
    from data.encoding import read_part

    parts = [path for path in sorted(folder.iterdir()) if ENCODED_PART.fullmatch(path.name)]
    inputs = 0
    for path in parts:
        found = read_part(str(path))
        if found is None:
            raise UserError(f"{path}: is damaged; delete it, the next run writes it again")
        inputs += len(found[1])
    return Found(True, f"{len(parts)} parts, {inputs:,} inputs")


def check_teacher_cache(folder: Path) -> Found:
    """Read a teacher's stored outputs and compare their SHA-256."""
    from bort.pretraining.teacher_cache import verify_cache

    shards, rows = verify_cache(str(folder))
    left = len(list(folder.glob("*.partial")))
    unfinished = f", {left} unfinished" if left else ""
    return Found(not left, f"{shards} shards, {rows:,} rows{unfinished}")


# ---- models --------------------------------------------------------------------------------------


def check_model(path: Path) -> str:
    """Load a saved model with its tokenizer, and the exports beside it; returns what it is."""
    from bort.inference import runtime
    from bort.parameters import check_finite_arrays, read_arrays
    from bort.saved_model import (
        MASKED_LM,
        load_model,
        model_config_path,
        require_tokenizer,
    )

    if not os.path.exists(model_config_path(str(path))):  # of export_params.py
        arrays = read_arrays(str(path))
        check_finite_arrays(str(path), arrays.items())
        return f"{len(arrays)} arrays"
    network, model_config, tokenizer = load_model(str(path))
    runtime.check_finite(str(path), network)
    if model_config.kind != MASKED_LM:  # pretraining on shards without one saves none
        require_tokenizer(tokenizer, str(path))
    words = [model_config.task or model_config.kind, model_config.model]
    if os.path.exists(runtime.onnx_path(str(path))):
        check_onnx(Path(runtime.onnx_path(str(path))))
        words.append("ONNX")
    if os.path.exists(runtime.Int8Files.of(str(path)).record):
        for name in ("onnx-int8", "mxnet-int8"):
            runtime.load_runtime(str(path), name)
        words.append("int8")
    return " ".join(words)


def check_models(folder: Path) -> Found:
    """Load every saved model of a folder."""
    return Found(True, "; ".join(check_model(path) for path in sorted(folder.glob("*.params"))))


def is_onnx_export(path: Path) -> bool:
    """Return whether a file ends with a SHA-256 as ours do, be it a wrong one."""
    from bort.inference.onnx_file import verify_onnx_file

    with suppress(UserError):
        return path.suffix == ".onnx" and verify_onnx_file(str(path))
    return True


def check_onnx(path: Path) -> Found:
    """Compare an ONNX file's SHA-256 and load it."""
    from bort.inference.onnx_file import onnx_session, verify_onnx_file

    verify_onnx_file(str(path))
    outputs = onnx_session(str(path), threads=1).get_outputs()
    return Found(True, f"a graph of {', '.join(output.name for output in outputs)}")


def check_huggingface(folder: Path) -> Found:
    """Read a folder of Hugging Face's into a network."""
    from bort.huggingface.folder import read
    from bort.inference.runtime import check_finite

    network, model_config, _ = read(str(folder))
    check_finite(str(folder), network)
    return Found(True, f"{model_config.task or model_config.kind} {model_config.model}")


def check_onnx_folder(folder: Path) -> Found:
    """Load the graphs of a folder in Hugging Face's ONNX layout."""
    from bort.inference.onnx_file import onnx_session

    paths = sorted(folder.glob("onnx/*.onnx"))
    for path in paths:
        onnx_session(str(path), threads=1)
    return Found(True, ", ".join(path.name for path in paths))


def check_listed(folder: Path) -> Found:
    """Return how many files SHA256SUMS lists; their sums are compared in every folder."""
    return Found(True, f"{len(listed(str(folder)))} files")


def is_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer of ours, be it a damaged one."""
    from bort.tokenization import TOKENIZER_JSON
    from bort.wordpiece import is_wordpiece_json

    path = folder / TOKENIZER_JSON
    with suppress(UserError):
        names = ("tokenizer.model", "vocab.json")
        return any(os.path.lexists(folder / name) for name in names) or (
            os.path.lexists(path) and is_wordpiece_json(str(path))
        )
    return True


def check_tokenizer(folder: Path) -> Found:
    """Load a tokenizer."""
    from bort.tokenization import load_tokenizer_folder

    tokenizer = load_tokenizer_folder(str(folder))
    return Found(tokenizer is not None, f"{tokenizer.vocab_size:,} tokens" if tokenizer else "")


# ---- runs ----------------------------------------------------------------------------------------


def check_checkpoint(folder: Path) -> Found:
    """Compare a checkpoint's SHA-256 sums and load its model and optimizer state."""
    found = checkpoint.load(str(folder))
    found.trainer_arrays()
    return Found(True, f"step {found.state['step']}, {check_model(Path(found.model_path))}")


def check_pretraining(folder: Path) -> Found:
    """Compare a run's last step with its number of steps; checkpoints are checked apart."""
    steps = checkpoint.steps(str(folder))
    check_metrics(folder / "metrics.jsonl", may_be_empty=not steps)
    for link in (checkpoint.LAST, checkpoint.BEST):
        if os.path.islink(folder / link) and not (folder / link).exists():
            raise UserError(f"{folder / link}: leads to a checkpoint that is missing")
    wanted = setting(folder / "config.json", "OptimizerSettings", "num_steps", int)
    return Found(bool(steps) and max(steps) >= wanted, f"step {max(steps, default=0)} of {wanted}")


Value = TypeVar("Value", int, str)


def setting(path: Path, concern: str, name: str, kind: type[Value]) -> Value:
    """Return a value of a run's config.json; raises `UserError` when it is of another type."""
    content = read_json(str(path))
    try:
        value = content[concern][name]
    except (KeyError, TypeError):
        value = None
    if not isinstance(value, kind):
        raise UserError(
            f"{path}: has no {concern}.{name} of type {kind.__name__}; it is not a run's"
        )
    return value


def check_metrics(path: Path, may_be_empty: bool) -> None:
    """Read the metrics of a run, which may have been stopped before its first line."""
    from scripts.plot_metrics import read_run

    if path.exists() and not (may_be_empty and path.stat().st_size == 0):
        read_run(str(path))


def check_finetuning(folder: Path) -> Found:
    """Read a run's results, its answers, its files for leaderboards and its model."""
    from bort.finetuning.scoreboard import read_run
    from data.tasks import get_task

    started = checkpoint.steps(str(folder)) or (folder / "metrics.json").exists()
    check_metrics(folder / "metrics.jsonl", may_be_empty=not started)
    setting(folder / "config.json", "TaskSettings", "task_name", str)
    if not (folder / "metrics.json").exists():
        return Found(False, "not finished; --resume continues it")
    run = read_run(folder / "metrics.json")
    for path in sorted(folder.glob("*_predictions.jsonl")):
        check_answers(path)
    task = get_task(run.task)
    for split in (name for name in run.answers if "/" not in name):
        official = task.submission_file(split) if split in task.test else None
        name = official or f"{split}_predictions.jsonl"
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing, the answers of {split}")
    names = check_submissions(folder)
    weights = folder / "best.params"
    if weights.with_suffix(".json").exists() and not weights.exists():
        raise UserError(f"{weights}: missing")
    words = [check_model(weights) if weights.exists() else "without weights", *names]
    return Found(True, ", ".join(words))


def check_answers(path: Path) -> None:
    """Read a file of answers: JSON lines with finite scores."""
    from data.rows import BadRowError, parse_object, read_lines, require_field

    for line in read_lines(path):
        try:
            scores = require_field(parse_object(line.content), "scores", list)
            if not np.isfinite(np.asarray(scores, float)).all():
                raise BadRowError("has scores that are not finite")
        except (BadRowError, TypeError, ValueError, OverflowError) as problem:
            raise UserError(f"{line.where}: {escaped(str(problem))}") from None


def check_sweep(folder: Path) -> Found:
    """Count the runs of a sweep that have finished; each is a folder of its own."""
    if not isinstance(read_json(str(folder / "sweep.json")), dict):
        raise UserError(f"{folder / 'sweep.json'}: is not the record of a sweep")
    runs = [path.parent for path in folder.glob("*/run.log")]
    finished = [run for run in runs if list(run.glob("*/metrics.json"))]
    complete = (folder / "sweep.tsv").exists() and len(finished) == len(runs)
    return Found(complete, f"{len(finished)} of {len(runs)} runs finished")


def check_agora(folder: Path) -> Found:
    """Read the record of Agora's rounds, its journal, its images and its model."""
    setting(folder / "config.json", "AgoraRunSettings", "search_space", str)
    fits = len(read_journal(folder / "journal.jsonl", "name"))
    if not (folder / "agora.json").exists():
        return Found(False, f"{fits} records; run its command again")
    content = read_json(str(folder / "agora.json"))
    rounds = content.get("rounds") if isinstance(content, dict) else None
    if not isinstance(rounds, list):
        raise UserError(f"{folder / 'agora.json'}: is not the record of a run")
    if "best" not in content:
        return Found(False, f"{len(rounds)} rounds; run its command again")
    names = check_submissions(folder)
    return Found(True, ", ".join([f"{len(rounds)} rounds", check_model(folder / "best.params"),
                                  *names]))  # fmt: skip


def check_fit(folder: Path) -> Found:
    """Read the metrics of a fit that was interrupted: those that have ended are models of a run."""
    check_metrics(folder / "metrics.jsonl", may_be_empty=not checkpoint.steps(str(folder)))
    return Found(False, "not finished; Agora's command repeats it")


def check_ose(folder: Path) -> Found:
    """Read the table of a search and its journal."""
    journals = sorted(folder.glob("journal-*.jsonl"))
    records = [record for path in journals for record in read_journal(path, "search", "candidate")]
    if not (folder / "ose.json").exists():
        measured = sum("candidate" in record for record in records)
        return Found(False, f"{measured} measurements; run its command again")
    content = read_json(str(folder / "ose.json"))
    if not isinstance(content, dict) or not isinstance(content.get("table"), list):
        raise UserError(f"{folder / 'ose.json'}: is not the table of a search")
    return Found(True, f"{len(content['table'])} rows, {content.get('model_name')} chosen")


def read_journal(path: Path, *keys: str) -> list[JSONObject]:
    """Return the records of a journal, which stays as it is; each has one of the keys."""
    from bort.journal import read_records

    return read_records(str(path), lambda record: any(key in record for key in keys))


# ---- leaderboards --------------------------------------------------------------------------------


@functools.cache  # asked for each file of every folder
def submission_names() -> dict[str, tuple[Any, str]]:
    """Return the task and split of each official file name."""
    from data.tasks import LEADERBOARDS, get_task, task_names

    tasks = [get_task(name) for suite in LEADERBOARDS for name in task_names(suite)]
    return {
        str(task.submission_file(split)): (task, split) for task in tasks for split in task.test
    }


def is_task_data(path: Path) -> bool:
    """Return whether a file holds a task's rows with their texts, not predictions.

    GLUE's AX and SuperGLUE's AX-b and AX-g have one name for both.
    """
    with suppress(OSError, ValueError, RecursionError):
        with open_regular(str(path)) as file:
            line = file.readline(MAX_ROW).decode()
        row = line.rstrip().split("\t") if path.suffix == ".tsv" else json.loads(line)
        return isinstance(row, (list, dict)) and ("sentence1" in row or "premise" in row)
    return False


def check_submissions(folder: Path) -> list[str]:
    """Check the form of every official file in a folder; returns them in words."""
    known, words = submission_names(), []
    for path in sorted(folder.iterdir()):
        if path.name in known:
            task, split = known[path.name]
            rows, official = len(task.parse_submission(path)), task.official_rows(split)
            short = f" of {official:,}" if rows < official else ""
            words.append(f"{path.name} {rows:,}{short} rows")
    return words


def check_submission_folder(folder: Path) -> Found:
    """Check a folder of official files and answers."""
    answers = sorted(folder.glob("*_predictions.jsonl"))
    for path in answers:
        check_answers(path)
    return Found(True, ", ".join([*check_submissions(folder), *(path.name for path in answers)]))


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip archive with a leaderboard's file, or cannot be read."""
    from data.download import member_names

    with suppress(UserError, OSError):
        return path.suffix == ".zip" and any(n in submission_names() for n in member_names(path))
    return True


def check_archive(path: Path) -> Found:
    """Check every file of a leaderboard's archive."""
    from data.download import member_names, unpack

    names = member_names(path)
    if not names:
        raise UserError(f"{path}: holds no files")
    if foreign := sorted(set(names) - set(submission_names())):
        raise UserError(f"{path}: {escaped(', '.join(foreign))}: no file of a leaderboard")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: has {', '.join(twice)} twice; pack it again")
    suites = {task.suite for name, (task, _) in submission_names().items() if name in names}
    if len(suites) > 1:
        raise UserError(f"{path}: mixes the files of {' and '.join(sorted(suites))}")
    with tempfile.TemporaryDirectory() as folder:
        unpack(path, names, Path(folder))
        check_submissions(Path(folder))
    wanted = {n for n, (task, _) in submission_names().items() if {task.suite} == suites}
    return Found(set(names) == wanted, f"{len(names)} of {len(wanted)} files of {min(suites)}")
