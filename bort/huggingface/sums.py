"""SHA-256 sums of the files of an exported folder, in the form that `sha256sum -c` reads."""

from __future__ import annotations

import os
from typing import Collection, Optional

from bort.errors import UserError
from bort.files import atomic_write, is_lfs_pointer, sha256_of

SUMS = "SHA256SUMS"


def write_sums(folder: str) -> None:
    """Write the sums of all files of a folder and of its subfolders."""
    paths = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    sums = {os.path.relpath(path, folder): sha256_of(path) for path in sorted(paths)}
    with atomic_write(os.path.join(folder, SUMS)) as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in sums.items())


def check_sums(folder: str, names: Optional[Collection[str]] = None) -> None:
    """Raise `UserError` when one of the named files that are there is not the exported one.

    Without names, all files must be there. Folders that were not exported here have no sums.
    """
    path = os.path.join(folder, SUMS)
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip("\n").partition("  ") for line in file]
    for digest, _, name in lines:
        found = os.path.join(folder, _inside(name))
        if names is not None and (name not in names or not os.path.exists(found)):
            continue
        if is_lfs_pointer(found):  # its reader says so
            continue
        if not os.path.isfile(found) or sha256_of(found) != digest:
            raise UserError(
                f"{found}: its SHA-256 is not that in {SUMS}; restore the file, or delete {SUMS} "
                "if you have changed the model"
            )


def _inside(name: str) -> str:
    """Return a path without what leads outside: a list may come from elsewhere."""
    return os.path.join("", *(part for part in name.split("/") if part not in ("", ".", "..")))
