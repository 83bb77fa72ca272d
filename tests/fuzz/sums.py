"""Checksums that fit a damaged file, as someone who knows the formats would write them.

Without them no damage would reach what reads a file behind its checksum.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from bort.files import OWN_SUM, json_sha256
from bort.journal import SUM, line_of
from bort.sums import SUMS

_LINE_SUM = re.compile(rb', "%s": "[0-9a-f]{8}"\}\Z' % SUM.encode())


def renew_sums(folder: Path, sample: Path, name: str) -> None:
    """Let every checksum in a folder be that of the file `name` as it is now.

    sample: the folder before the damage.
    """
    changed = [name]
    while changed:
        one = changed.pop()
        path = folder / one
        if not path.is_file():
            continue
        path.write_bytes(_with_own_sums(path.suffix, path.read_bytes()))
        old, new = _sha256(sample / one), _sha256(path)
        for other in sorted(folder.rglob("*")):
            listing = other.suffix == ".json" or other.name == SUMS
            content = other.read_bytes() if listing and other.is_file() else b""
            if old != new and old in content:
                other.write_bytes(content.replace(old, new))
                changed.append(str(other.relative_to(folder)))


def _sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).hexdigest().encode()


def _with_own_sums(suffix: str, content: bytes) -> bytes:
    """Return the content of a file with the sums that it has of itself."""
    if suffix == ".jsonl":
        return b"\n".join(map(_line, content.split(b"\n")))
    if suffix != ".json":
        return content
    try:
        value = json.loads(content)
        stored = value.pop(OWN_SUM)
        return content.replace(stored.encode(), json_sha256(value).encode())
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return content


def _line(line: bytes) -> bytes:
    if not _LINE_SUM.search(line):
        return line
    try:
        record = json.loads(line)
        del record[SUM]
        return line_of(record)[:-1]
    except (ValueError, RecursionError):
        return line
