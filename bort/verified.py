"""Verifying files once: a file that has not changed since is not read again."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Callable, NamedTuple, Sequence

from bort.errors import UserError
from bort.files import read_json_as, write_json
from bort.mxnet_setup import usable_cores

# A file that was written this short a time ago may change again without a change of its times.
_SETTLED_SECONDS = 2.0


class Verifiable(NamedTuple):
    """A file, what it is verified against, and the function that reads it.

    verify: raises `UserError` when the file is damaged.
    """

    path: str
    expected: Sequence[Any]
    verify: Callable[[], None]


def verify_changed(record: str, files: Sequence[Verifiable], remember: bool = True) -> None:
    """Verify the files that have changed since they were verified, several at once.

    Args:
        record: JSON file that remembers what was verified; written where that is possible.
        files: of different names.
        remember: False verifies every file, whether or not it was verified before, and writes
            nothing.
    """
    # Of the files as they are before they are read.
    states = {os.path.basename(file.path): _state(file) for file in files}
    verified: dict[str, list[Any]] = {}
    if remember and os.path.exists(record):
        with suppress(UserError):  # a damaged record: verify again
            verified = read_json_as(record, dict[str, list[Any]])
    changed = [
        file for file, (name, state) in zip(files, states.items()) if verified.get(name) != state
    ]
    if not changed:
        return
    with ThreadPoolExecutor(min(usable_cores(), len(changed))) as pool:
        for _ in pool.map(lambda file: file.verify(), changed):
            pass
    if not remember:
        return
    settled = time.time_ns() - _SETTLED_SECONDS * 1e9
    folder = os.path.dirname(record)
    content = {
        # Of files that others verified.
        **{
            name: state
            for name, state in verified.items()
            if name not in states and os.path.exists(os.path.join(folder, name))
        },
        **{name: state for name, state in states.items() if max(state[1:3]) < settled},
    }
    if content != verified:
        with suppress(UserError, OSError):  # a folder that cannot be written to is read each time
            write_json(record, content)


def _state(file: Verifiable) -> list[Any]:
    """Return what changes with a file's content, and what it is verified against."""
    status = os.stat(file.path)
    # The time of the last change of the file's status cannot be set back, unlike that of content.
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, *file.expected]
