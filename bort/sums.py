"""SHA256SUMS: the SHA-256 of files of a folder, in the form that `sha256sum -c` reads."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from typing import Collection, Iterator, Optional

from bort.errors import UserError
from bort.files import (
    MODEL_BYTES,
    WHOLE_BYTES,
    atomic_write,
    is_lfs_pointer,
    open_regular,
    sha256_of,
)

SUMS = "SHA256SUMS"
_SUM = re.compile(r"(\\?)(\w+) [ *](.+)")  # as sha256sum writes it, with --binary, too


def write_sums(folder: str, names: Optional[Collection[str]] = None) -> None:
    """Write the sums of the named files; without names, of all files in a folder and below it.

    Sums of other files that are there stay, and lines that are no sums.
    """
    with _alone(folder):
        if names is None:
            paths = [
                os.path.join(place, name) for place, _, files in os.walk(folder) for name in files
            ]
            names = [os.path.relpath(path, folder) for path in paths]
        others = [line for line in _read_lines(folder) if not _SUM.fullmatch(line)]
        sums = {name: digest for name, digest in _read_sums(folder) if _is_file(folder, name)}
        sums.update({name: sha256_of(os.path.join(folder, name)) for name in names if name != SUMS})
        with atomic_write(os.path.join(folder, SUMS), "wb") as file:
            file.writelines(os.fsencode(f"{line}\n") for line in others)
            file.writelines(
                os.fsencode(_line(name, digest)) for name, digest in sorted(sums.items())
            )


@contextlib.contextmanager
def _alone(folder: str) -> Iterator[None]:
    """Wait for another program that writes a list there: each has to read what the other wrote."""
    handle = os.open(folder or ".", os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def check_sums(folder: str, names: Optional[Collection[str]] = None) -> None:
    """Raise `UserError` when one of the named files that are there is another than was written.

    Without names, all files of the list must be there. A folder without a list, and files that are
    not in it, have no sums.
    """
    for name, digest in _read_sums(folder):
        found = os.path.join(folder, _inside(name))
        if names is not None and (name not in names or not os.path.exists(found)):
            continue
        if is_lfs_pointer(found):  # its reader reports that
            continue
        if not os.path.isfile(found):
            kind = "not a file" if os.path.lexists(found) else "missing"
            raise UserError(
                f"{found}: is {kind}, but listed in {SUMS}; restore the file, or delete its line"
            )
        if sha256_of(found, MODEL_BYTES) != digest:
            raise UserError(
                f"{found}: its SHA-256 is not that in {SUMS}; restore the file, or delete {SUMS} "
                "if you have changed it"
            )


def listed(folder: str) -> list[str]:
    """Return the names in a folder's list; none where there is no list."""
    return [name for name, _ in _read_sums(folder)]


def check_sum(path: str) -> None:
    """Raise `UserError` when a file is not the one whose sum is in the list beside it."""
    folder, name = os.path.split(path)
    check_sums(folder, [name])


def _read_sums(folder: str) -> list[tuple[str, str]]:
    """Return (name, SHA-256) of each sum in the list; none where there is no list."""
    return [_parsed(found) for line in _read_lines(folder) if (found := _SUM.fullmatch(line))]


def _read_lines(folder: str) -> list[str]:
    path = os.path.join(folder, SUMS)
    if not os.path.exists(path):
        return []
    with open_regular(path, WHOLE_BYTES) as file:
        return [line for line in os.fsdecode(file.read()).split("\n") if line]


def _line(name: str, digest: str) -> str:
    """Return a line of the list; sha256sum marks one with an escaped name by a backslash."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"


def _parsed(found: re.Match[str]) -> tuple[str, str]:
    escaped, digest, name = found.groups()
    if escaped:
        name = re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], name)
    # As of `sha256sum ./*` and of `find`; other programs write capital letters.
    return name.removeprefix("./"), digest.lower()


def _is_file(folder: str, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, _inside(name)))


def _inside(name: str) -> str:
    """Return a path without what leads outside: the list may come from another person."""
    return os.path.join("", *(part for part in name.split("/") if part not in ("", ".", "..")))
