"""Text in object stores and on web servers, read by fsspec: s3://, gs://, https:// and others.

Only text is read from there. What is written needs a file system: renaming, locks and memory maps
keep a run's files whole.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import IO, Any, Iterator

from bort.errors import UserError, escaped

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")
_GLOB = re.compile(r"[*?[]")
# The extra of this project with the packages for a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "https", "https": "https"}


def is_remote(path: str) -> bool:
    """Return whether a path is an address such as s3://bucket/text.txt."""
    return bool(_ADDRESS.match(path))


def remote_files(pattern: str) -> list[str]:
    """Return the addresses of the files that an address, a glob or a folder names, sorted.

    A web server has no folders: its address, which may have a `?`, is that of a file.

    Raises `UserError` without the packages for the protocol, and when the server says no.
    """
    with remote_errors(pattern):
        file_system, path = _file_system(pattern)
        if pattern.startswith("http"):
            return [pattern] if _is_served(file_system, path) else []
        folder = path
        if star := _GLOB.search(path):
            folder = path[: star.start()].rpartition("/")[0]
            found = [each for each in file_system.glob(path) if file_system.isfile(each)]
        elif file_system.isdir(path):
            found = file_system.find(path)
        else:
            return [pattern] if file_system.exists(path) else []
        chosen = [each for each in found if not _is_hidden(each, folder)]
        return sorted(map(file_system.unstrip_protocol, chosen))


def _is_served(file_system: Any, address: str) -> bool:
    """Return whether a web server has a file.

    fsspec says of every failure that there is none: any other than that is raised.
    """
    try:
        file_system.info(address)
    except FileNotFoundError as error:
        reason = error.__cause__
        if reason is None or getattr(reason, "status", None) == 404:
            return False
        raise reason from None
    return True


def _is_hidden(path: str, folder: str) -> bool:
    return any(name.startswith(".") for name in path[len(folder) :].split("/"))


def open_remote(path: str) -> IO[bytes]:
    """Open an address; it is read by ranges."""
    file_system, name = _file_system(path)
    return file_system.open(name, "rb")


def remote_size(path: str) -> int:
    """Return the bytes of an address, 0 where the server does not report it."""
    with remote_errors(path):
        file_system, name = _file_system(path)
        return file_system.size(name) or 0


def _file_system(path: str) -> tuple[Any, str]:
    try:
        import fsspec

        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        protocol = path.partition("://")[0]
        cure = f"; pip install -e '.[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else ""
        raise UserError(f"--input_file {path}: {' '.join(str(error).split())}{cure}") from None


@contextmanager
def remote_errors(path: str, name: str = "") -> Iterator[None]:
    """Turn what fsspec and the packages below it raise into a `UserError`; `name` is for messages.

    They raise many kinds. Local paths are let alone.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        reason = escaped(f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise UserError(f"{name or path}: cannot be read ({reason})") from None
