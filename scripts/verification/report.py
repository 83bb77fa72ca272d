"""Find the folders of this project under a path, check each, and format a table."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

from bort.errors import UserError, printable
from bort.files import read_json
from bort.huggingface.families import FAMILIES, architecture_of
from bort.sums import SUMS, check_sums
from data.shards import MANIFEST_FILE, UNFINISHED_FILE
from scripts.verification import checks
from scripts.verification.checks import ENCODED_PART, Kind

COMPLETE, UNFINISHED, DAMAGED = "complete", "unfinished", "damaged"


class Row(NamedTuple):
    """One folder or file: what it is, its state, and details or what is wrong with it."""

    path: str
    what: str
    state: str
    detail: str


def _has(*names: str) -> Callable[[Path], bool]:
    return lambda folder: any(os.path.lexists(folder / name) for name in names)


def _says(name: str, *keys: str) -> Callable[[Path], bool]:
    """Return whether the JSON file of a folder has one of the keys; a damaged one has them all."""

    def matches(folder: Path) -> bool:
        if not os.path.lexists(folder / name):
            return False
        try:
            content = read_json(str(folder / name))
        except UserError:
            return True
        return isinstance(content, dict) and any(key in content for key in keys)

    return matches


def _holds(pattern: str) -> Callable[[Path], bool]:
    return lambda folder: any(re.fullmatch(pattern, name) for name in os.listdir(folder))


def _is_checkpoint(folder: Path) -> bool:
    return bool(re.fullmatch(r"step-\d{7,}", folder.name)) or _has("state.json")(folder)


def _is_huggingface(folder: Path) -> bool:
    weights = _has("model.safetensors", "pytorch_model.bin", "tokenizer_config.json")
    return weights(folder) and _has("config.json")(folder)


def _is_onnx_folder(folder: Path) -> bool:
    return any(folder.glob("onnx/*.onnx")) and _has("config.json")(folder)


def _is_submission(folder: Path) -> bool:
    names = os.listdir(folder)
    answers = any(name.endswith("_predictions.jsonl") for name in names)
    known = [name for name in names if name in checks.submission_names()]
    return answers or any(not checks.is_task_data(folder / name) for name in known)


def _is_run_with(concern: str) -> Callable[[Path], bool]:
    """Return whether a run's config.json has a concern that those of pretraining lack.

    The others, too, have checkpoints until they end.
    """
    says, is_pretraining = (_says("config.json", key) for key in (concern, "StudentSettings"))
    return lambda folder: says(folder) and not is_pretraining(folder)


def _is_another_network(folder: Path) -> bool:
    """Return whether a Hugging Face folder holds a network that this project does not have.

    It is of another family, or has another head.
    """
    if not _has("config.json")(folder) or _has(SUMS)(folder):
        return False
    try:
        content = read_json(str(folder / "config.json"))
    except UserError:
        return False
    if not isinstance(content, dict):
        return False
    model_type, classes = content.get("model_type"), content.get("architectures")
    is_other_family = isinstance(model_type, str) and model_type not in FAMILIES
    return is_other_family or (isinstance(classes, list) and _is_another_class(classes))


def _is_another_class(names: Sequence[object]) -> bool:
    try:
        architecture_of(", ".join(map(str, names)))
    except UserError:
        return bool(names)
    return False


# Data that may lie in the folder of something else.
TEACHER_CACHE = Kind("teacher cache", _has("projection.npz"), checks.check_teacher_cache)
SHARDS = Kind("shards", _holds(r"part-\d+\.npz"), checks.check_shards)
# The first that matches names a folder; what it may match as well stands below it.
KINDS: Sequence[Kind] = (
    Kind("checkpoint", _is_checkpoint, checks.check_checkpoint),
    Kind("demo page", _has("page.json"), checks.check_listed),
    Kind("ONNX export for Hugging Face", _is_onnx_folder, checks.check_onnx_folder),
    Kind("Hugging Face export", _is_huggingface, checks.check_huggingface),
    Kind("sweep", _has("sweep.json", "sweep.tsv"), checks.check_sweep),
    Kind("OSE search", _holds(r"ose\.json|journal-\d+\.jsonl"), checks.check_ose),
    Kind("Agora run", _has("agora.json", "journal.jsonl"), checks.check_agora),
    Kind("fine-tuning run", _is_run_with("FinetuningRunSettings"), checks.check_finetuning),
    Kind("fit of Agora", _is_run_with("Fit"), checks.check_fit),
    Kind("pretraining run", _holds(r"step-\d{7,}"), checks.check_pretraining),
    Kind("pretraining run", _says("config.json", "StudentSettings"), checks.check_pretraining),
    Kind("fine-tuning run", _has("metrics.json"), checks.check_finetuning),
    *(TEACHER_CACHE, SHARDS),
    Kind("shards", _says(UNFINISHED_FILE, "shards"), checks.check_shards),
    Kind("teacher cache", _says(MANIFEST_FILE, "teacher_sha256"), checks.check_teacher_cache),
    Kind("shards", _has(MANIFEST_FILE), checks.check_shards),
    Kind("encoded cache", _holds(ENCODED_PART.pattern), checks.check_encoded_cache),
    Kind("saved model", _holds(r".*\.params"), checks.check_models),
    Kind("task data", _has("source.json"), checks.check_listed),
    Kind("submission", _is_submission, checks.check_submission_folder),
    Kind("tokenizer", checks.is_tokenizer, checks.check_tokenizer),
    Kind("files with sums", _has(SUMS), checks.check_listed),
)  # fmt: skip
# Folders that are checked with the one that holds them.
PARTS = ("tokenizer", "int8", "tensorboard")


def verify(path: str) -> list[Row]:
    """Check everything under a path; raises `UserError` when nothing there is this project's."""
    root = Path(path)
    if not root.exists():
        raise UserError(f"{path}: not found")
    rows = [_file_row(root)] if root.is_file() else list(_rows(root))
    if not rows:
        raise UserError(f"{path}: holds nothing that this project writes")
    return rows


def _rows(root: Path) -> Iterator[Row]:
    """Yield the rows of a folder and of those below it, each once.

    What links lead to comes last: so what is below the folder has its own name, whatever links are
    beside it. Links to folders above lead back here.
    """
    links, seen = [root], set(root.resolve().parents)
    for folder in links:  # grows
        if folder.resolve() not in seen:
            yield from _rows_below(folder, seen, links)


def _rows_below(
    folder: Path, seen: set[Path], links: list[Path], part: bool = False
) -> Iterator[Row]:
    """Yield the rows of a folder and of those below it; note what was seen, and the links."""
    seen.add(folder.resolve())
    kinds = _kinds_of(folder)
    for kind in [] if part else kinds:
        yield _row(str(folder), kind, folder)
    for path in sorted(folder.iterdir()):
        is_part = bool(kinds) and path.name in PARTS
        if path.is_dir() and path.is_symlink():
            links += [] if is_part else [path]
        elif path.is_dir():
            yield from _rows_below(path, seen, links, is_part)
        elif checks.is_archive(path) or (not part and _is_lone_onnx_file(path)):
            yield _file_row(path)


def _kinds_of(folder: Path) -> list[Kind]:
    """Return what a folder holds: one kind, and shards or a teacher cache beside it."""
    if _is_another_network(folder):
        return []
    first = next((kind for kind in KINDS if kind.matches(folder)), None)
    if first is None:
        return []
    beside = [kind for kind in (TEACHER_CACHE, SHARDS) if kind.matches(folder)]
    return [first, *(kind for kind in beside if kind.name != first.name)]


def _is_lone_onnx_file(path: Path) -> bool:
    """Return whether an export has neither its parameters beside it nor a folder that lists it."""
    is_alone = not path.with_suffix(".params").exists() and not _is_onnx_folder(path.parent.parent)
    return is_alone and checks.is_onnx_export(path)


def _file_row(path: Path) -> Row:
    if path.suffix == ".zip":
        kind = Kind("leaderboard archive", Path.is_file, checks.check_archive)
    elif path.suffix == ".params":
        kind = Kind("saved model", Path.is_file,
                    lambda file: checks.Found(True, checks.check_model(file)))  # fmt: skip
    elif path.suffix == ".onnx":
        kind = Kind("ONNX export", Path.is_file, checks.check_onnx)
    else:
        raise UserError(
            f"{path}: give a folder, a .params or .onnx file or a leaderboard's .zip file"
        )
    return _row(str(path), kind, path)


def _row(name: str, kind: Kind, path: Path) -> Row:
    try:
        if path.is_dir():
            check_sums(str(path))
        found = kind.check(path)
        if path.is_dir():
            checks.check_json(path)
    except UserError as error:
        return Row(name, kind.name, DAMAGED, str(error))
    except OSError as error:
        return Row(name, kind.name, DAMAGED, f"{error.filename or name}: {error.strerror}")
    return Row(name, kind.name, COMPLETE if found.complete else UNFINISHED, found.detail)


def table(rows: Sequence[Row]) -> str:
    """Return the rows, aligned."""
    lines = [Row("PATH", "KIND", "STATE", "DETAILS"), *(Row(*map(printable, r)) for r in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line.detail]).rstrip()
        for line in lines
    )
