"""Whether a command resumes a folder: the flags given, compared with those recorded there."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Collection, Mapping, Sequence

# Flags that name a file or a folder: the same one may be spelled in several ways.
PATHS = {
    *("data", "data_eval", "teacher_cache", "teacher_ckpt_dir"),
    *("data_dir", "pretrained_parameters", "model_parameters", "tau_model", "timaeus"),
    *("vocab_file", "bpe_ranks", "sentencepiece"),
}


def changed_flags(
    recorded: Mapping[str, Any], settings: Sequence[Any], free: Collection[str] = ()
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
        and not _same(
            field.name, recorded.get(field.name, field.default), getattr(each, field.name)
        )
    ]


def _same(name: str, recorded: Any, given: Any) -> bool:
    if name in PATHS and isinstance(recorded, str) and isinstance(given, str):
        return _same_path(recorded, given)
    return recorded == given


def _same_path(recorded: str, given: str) -> bool:
    """Tell whether two spellings are of one path, or the recorded one was moved away.

    Something that was moved keeps its own name: `runs/model` is not found in `other/RTE`.
    """
    if os.path.realpath(recorded) == os.path.realpath(given):
        return True
    names = (os.path.basename(os.path.normpath(path)) for path in (recorded, given))
    return not os.path.exists(recorded) and len(set(names)) == 1
