"""Files: atomic writes, checksums, JSON and YAML."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from typing import Any, Iterator

from bort.errors import UserError


def write_json(path: str, content: Any) -> None:
    """Write `content` as JSON under `path`, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(f"{text}\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def read_json(path: str) -> Any:
    """Read a JSON file; raises `UserError` when it is missing or not JSON."""
    try:
        with open(path, encoding="utf-8") as handle:
            return json.load(handle)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from None


def read_yaml(path: str) -> Any:
    """Read a YAML file; raises `UserError` when it is missing or not YAML."""
    import yaml

    try:
        with open(path, encoding="utf-8") as handle:
            return yaml.safe_load(handle)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None


_COPY_BYTES = 1 << 20


def sha256_of(path: str) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_COPY_BYTES):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Give a folder to fill that becomes `path` when all went well, and vanishes otherwise.

    Raises `UserError` when `path` is there already or cannot be made.
    """
    path = os.path.normpath(path)
    if os.path.lexists(path):
        raise UserError(f"--output {path}: is there already; name a new folder")
    above, name = os.path.split(path)
    temporary = os.path.join(above, f".{name}.{os.getpid()}.tmp")
    try:
        os.makedirs(temporary)
        yield temporary
        os.rename(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error).strip().splitlines()[0]
        raise UserError(f"--output {path}: cannot be written ({reason})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
