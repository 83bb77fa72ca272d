"""A model named as on the Hugging Face hub, downloaded to its cache at a fixed revision."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple, Optional, Sequence

from bort.errors import UserError, reasons
from bort.huggingface.tensors import INDEX, TORCH_WEIGHTS, WEIGHTS

_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_FILES = re.compile(
    r"(?:config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|"
    r"vocab\.txt|merges\.txt|"
    r"tokenizer\.model|SHA256SUMS|model(?:-\d+-of-\d+)?\.safetensors"
)


class Located(NamedTuple):
    """A folder of files; `origin` is name@commit of a model of the hub, else empty."""

    folder: str
    origin: str


def locate(source: str, revision: Optional[str] = None) -> Located:
    """Return the folder of a source: itself, or the cache's for a model of the hub.

    revision: branch, tag or commit of a model of the hub; default: its main branch.

    Raises `UserError` when it is neither a folder nor the name of a model that can be had.
    """
    if os.path.isdir(source):
        if revision:
            raise UserError(f"--revision {revision}: {source} is a folder, not a name on the hub")
        return Located(source, "")
    if os.path.exists(source) or not _NAME.fullmatch(source):
        raise UserError(f"{source}: is neither a folder nor the name of a model on the hub")
    return _downloaded(source, revision)


def _downloaded(name: str, revision: Optional[str]) -> Located:
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision)
    except huggingface_hub.errors.HfHubHTTPError as error:
        raise _refused(name, revision, error) from None
    except Exception as error:  # no connection: classes of the HTTP library
        return _cached(name, revision, error)
    files = _wanted([file.rfilename for file in info.siblings or []])
    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files)
    except Exception as error:
        raise _refused(name, revision, error) from None
    return Located(folder, _origin(name, folder))


def _wanted(files: Sequence[str]) -> list[str]:
    """Return the files to download: torch's weights only where there are no others."""
    wanted = [file for file in files if _FILES.fullmatch(file) or file == INDEX]
    has_weights = WEIGHTS in wanted or INDEX in wanted
    return wanted if has_weights or TORCH_WEIGHTS not in files else [*wanted, TORCH_WEIGHTS]


def _cached(name: str, revision: Optional[str], reason: Exception) -> Located:
    """Return what an earlier download has left in the cache."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        raise UserError(
            f"{name}: is not a folder, and the hub cannot be reached ({_line(reason)}); download "
            "it elsewhere and give its folder"
        )
    folder = os.path.dirname(found)
    return Located(folder, _origin(name, folder))


def _origin(name: str, folder: str) -> str:
    """Return name@commit; the cache names the folder of a snapshot after its commit."""
    return f"{name}@{os.path.basename(os.path.normpath(folder))}"


def _refused(name: str, revision: Optional[str], error: Any) -> UserError:
    at = f" at revision {revision}" if revision else ""
    return UserError(
        f"{name}{at}: is not a folder, and cannot be downloaded from the hub ({_line(error)})"
    )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {reasons(error)[0]}"
