"""Whether a command resumes a folder: the flags given, compared with those recorded there."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any, Collection, Sequence

from bort import checkpoint
from bort.errors import UserError
from bort.files import read_json
from bort.parameters import parameter_file
from bort.reporter import CONFIG
from bort.types import JSONMapping

# Flags that name a model: its file, its folder, or a run.
MODELS = {
    *("pretrained_parameters", "model_parameters", "teacher_ckpt_dir", "tau_model", "timaeus"),
    "student_parameters",
}
# Flags that name another file or folder.
PATHS = {
    *("data", "data_eval", "teacher_cache", "data_dir", "vocab_file", "bpe_ranks"),
    "sentencepiece",
}


def refuse_other_config(folder: str, flag: str, concerns: Collection[str]) -> None:
    """Raise `UserError` when a folder's config.json, which a new run replaces, is no such run's.

    flag: the one that named the folder.
    concerns: settings classes, one of which the file has if a run of this program wrote it.
    """
    path = os.path.join(folder, CONFIG)
    if checkpoint.steps(folder) or not os.path.exists(path):
        return
    try:
        content = read_json(path, verify=False)
    except UserError:  # damaged; nothing is lost with it
        return
    if not isinstance(content, dict) or content.keys().isdisjoint(concerns):
        raise UserError(
            f"{flag} {folder}: holds the {CONFIG} of something else, which a run would replace; "
            "name another folder"
        )


def changed_flags(
    recorded: JSONMapping, settings: Sequence[Any], free: Collection[str] = ()
) -> list[str]:
    """Return the flags of settings dataclasses that differ from recorded ones, with dashes.

    A flag that was not recorded, because it did not exist then, had its default. `free` flags may
    differ.
    """
    return [
        f"--{field.name}"
        for each in settings
        for field in dataclasses.fields(each)
        if field.name not in free
        and not same_value(
            field.name, recorded.get(field.name, field.default), getattr(each, field.name)
        )
    ]


def warn_of(changed: Sequence[str]) -> None:
    """Name the flags, if any, that a resumed run has other values of than its checkpoint."""
    if changed:
        print(
            f"warning: {', '.join(changed)}: not what the checkpoint was made with; continuing "
            "with the values given now",
            file=sys.stderr,
        )


def same_value(name: str, recorded: object, given: object) -> bool:
    """Return whether two values of a flag are equal; spellings of a path or model may differ."""
    if isinstance(recorded, str) and isinstance(given, str):
        if name in MODELS:
            return _same_path(recorded, given) or _same_model(recorded, given)
        if name in PATHS:
            return _same_path(recorded, given)
    return recorded == given


def _same_path(recorded: str, given: str) -> bool:
    """Return whether two spellings are of one path, or the recorded one was moved away.

    Something that was moved keeps its own name: `runs/model` is not found in `other/RTE`.
    """
    if os.path.realpath(recorded) == os.path.realpath(given):
        return True
    names = (os.path.basename(os.path.normpath(path)) for path in (recorded, given))
    return not os.path.exists(recorded) and len(set(names)) == 1


def _same_model(recorded: str, given: str) -> bool:
    """Return whether two paths are of one parameter file."""
    try:
        files = [os.path.realpath(parameter_file(path)) for path in (recorded, given)]
    except UserError:
        return False
    return files[0] == files[1]
